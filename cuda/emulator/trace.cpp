#include "trace.h"

#include "launch.h"
#include "model.h"

namespace emulator {

void Trace::add(Event event) {
    end = std::max(end, event.to), event.launch = launch;
    int& n = last[event.actor];
    if (n >= 0) {
        Event& before = events[n];
        if (before.to == event.from && before.launch == event.launch && before.block == event.block && before.warp == event.warp && before.kind == event.kind &&
            before.tiles[0] == event.tiles[0] && before.tiles[1] == event.tiles[1] && before.about == event.about) {
            before.to = event.to, before.amount += event.amount;
            return;
        }
    }
    n = events.size();
    events.push_back(event);
}

static std::string name_of(const Event& event) {
    const int actor = event.actor;
    if (actor == WARP) return "warp";
    if (actor == TENSOR_CORES) return "tensor cores";
    if (actor < EXPONENTIALS_OF) return text("tensor core %d", actor - TENSOR_CORE_OF);
    if (actor < ISSUE_OF) return text("exponentials %d", actor - EXPONENTIALS_OF);
    return actor == SHARED_ENGINE ? "shared memory" : actor == COPIES_IN ? "copies in" : "copies out";
}

static const char* tensor(int tile) { return tile ? session.memories[tile - 1].name.c_str() : ""; }

static std::string report(const Trace& trace) {
    std::string lines;
    for (const Event& e : trace.events) {
        lines += text("%d\t%s\t%d\t%d\t%s\t%s\t%s\t", e.launch, name_of(e).c_str(), e.block, e.warp, e.kind, tensor(e.tiles[0]), tensor(e.tiles[1]));
        lines += text(e.about.words, e.about.of, e.about.number) + text("\t%.15g\t%.15g\t%.15g\t@%x\n", e.amount, e.from, e.to, e.site);
    }
    return lines;
}

}  // namespace emulator

// As text, for Python: a line for each event, fields separated by tabs; and for each constant of the model.
extern "C" const char* emulator_trace() {
    static thread_local std::string text;
    text = emulator::session.trace ? emulator::report(*emulator::session.trace) : "";
    return text.c_str();
}
extern "C" void emulator_start_trace(int enabled) { emulator::session.trace = enabled ? std::make_unique<emulator::Trace>() : nullptr; }
extern "C" const char* emulator_model() {
#define LINE(NAME, VALUE, KIND, SOURCE) #NAME "\t" #VALUE "\t" KIND "\t" SOURCE "\n"
    return MODEL(LINE);
#undef LINE
}
