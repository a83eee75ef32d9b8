#pragma once
namespace emulator {
int encode_tensor_map();
}
