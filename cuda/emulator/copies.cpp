#include "block.h"
namespace emulator { int encode_tensor_map() { return 1; } }
