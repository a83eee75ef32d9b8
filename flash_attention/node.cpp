// A plain call with gradients in C++: what PlainAttention of autograd.py does in Python. A small call is bound by the host, and a backward in Python
// waits, on autograd's thread, for Python's lock. node.py has this file compiled, and loads it; it needs no header of Python's and none of CUDA's.
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "attention.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t FEW = 16;  // backwards that a plan keeps, as in shortcut.py

// The launch of a forward or a backward, as `Launch.packed` of backends/launch.py writes it: all but addresses, `deterministic` and the stream.
struct Launch {
    int (*attention)(const AttentionParams*);
    const char* (*error_name)(int);
    int64_t workspace_floats;
    AttentionParams params;
    KeySource keys;  // all zero

    explicit Launch(const std::string& packed) {
        TORCH_CHECK(packed.size() == sizeof *this, "a launch is not of the size that Python packed");
        std::memcpy(this, packed.data(), sizeof *this);
    }

    // An empty (B, H, N, D) that lies as x of `params` says, and to which x now points.
    Tensor empty(Tensor4& x, int64_t H, int64_t N, int64_t D, const Tensor& q) const {
        Tensor made = at::empty_strided({params.B, H, N, D}, {x.stride_b, x.stride_h, x.stride_n, 1}, q.options());
        x.data = made.data_ptr();
        return made;
    }

    // Enqueues the kernels on the current stream of q's device.
    void operator()(const Tensor& q) {
        Tensor workspace;
        if (workspace_floats) {
            workspace = at::empty({workspace_floats}, q.options().dtype(at::kFloat));
            params.workspace = workspace.data_ptr<float>();
        }
        params.deterministic = at::globalContext().deterministicAlgorithms();
        if (q.is_cuda()) {
            const c10::impl::VirtualGuardImpl streams(q.device().type());
            params.stream = static_cast<cudaStream_t>(streams.getStreamNativeHandle(streams.getStream(q.device())));
        }
        if (const int error = attention(&params)) raise(error, q);
    }

    // Joins strings itself: TORCH_CHECK would by a stream, which crashes where another C++ library of the process has brought its own.
    void raise(int error, const Tensor& q) const {
        std::string shape;
        for (const int64_t n : q.sizes()) shape += (shape.empty() ? "(" : ", ") + std::to_string(n);
        const std::string where = q.device().str() + ", " + shape + ") " + c10::toString(q.scalar_type());
        TORCH_CHECK(false, "CUDA error " + std::to_string(error) + " at launch on " + where + ": " + error_name(error));
    }
};

// Whether x lies as a kernel is told. It is not told of the last stride, which is 1, or means nothing in a single column.
bool lies_as(const Tensor4& told, const Tensor& x) {
    return x.strides().slice(0, 3) == at::IntArrayRef{told.stride_b, told.stride_h, told.stride_n} && (x.stride(3) == 1 || x.size(3) == 1);
}

// Everything that determines how a kernel finds its way in these tensors.
std::vector<int64_t> form(const variable_list& tensors) {
    std::vector<int64_t> form;
    form.reserve(10 * tensors.size());
    for (const Tensor& x : tensors) {
        form.insert(form.end(), x.sizes().begin(), x.sizes().end());
        form.insert(form.end(), x.strides().begin(), x.strides().end());
        form.insert(form.end(), {static_cast<int64_t>(x.scalar_type()), x.device().index()});
    }
    return form;
}

// The launch of a plain forward, and those of its backwards by the form of dO, q, k, v, O and LSE: strides of dO differ, and hooks
// (torch.autograd.graph.saved_tensors_hooks) may change the others.
struct Plan {
    const Launch forward;
    const c10::DispatchKeySet plain;  // the dispatch keys of a plain tensor on this device
    const std::string settings;       // of the call, for Python

    void keep(const variable_list& tensors, const Launch& backward) {
        const std::lock_guard lock(mutex);
        if (backwards.size() >= FEW) backwards.clear();
        backwards.insert_or_assign(form(tensors), backward);
    }

    // Nothing if Python must compute the backward of these tensors: because it will be differentiated again, a transform, a mode or a profiler is
    // active, a tensor is not a plain one, has a tangent or does not begin at a multiple of 16 bytes, or their form is new.
    std::optional<Launch> backward(const variable_list& tensors) {
        const auto modes = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
        if (at::GradMode::is_enabled() || !modes.empty() || at::hasCallbacks()) return {};
        for (const Tensor& x : tensors) {
            if (x.key_set() != plain || reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 || x._fw_grad(0).defined()) return {};
        }
        const std::lock_guard lock(mutex);
        const auto found = backwards.find(form(tensors));
        return found == backwards.end() ? std::nullopt : std::optional(found->second);
    }

    std::map<std::vector<int64_t>, Launch> backwards;
    std::mutex mutex;
};

// A plan lies in the memory of a tensor. So PyTorch counts its references, and passes it to an op in less time than an object of a custom class,
// which compiled autograd would refuse besides.
Plan& plan_in(const Tensor& x) { return *static_cast<Plan*>(x.data_ptr()); }

Tensor make_plan(const Tensor& q, const std::string& packed, std::string settings) {
    auto* plan = new Plan{Launch(packed), q.key_set(), std::move(settings)};
    return at::from_blob(plan, {sizeof *plan}, [](void* x) { delete static_cast<Plan*>(x); }, at::kByte);
}

void keep_backward(const Tensor& plan, const variable_list& tensors, const std::string& packed) { plan_in(plan).keep(tensors, Launch(packed)); }

// dQ, dK and dV by Python (node.py), which calls keep_backward if the next backward of tensors like these can be computed here. Not by the
// dispatcher: Python finds out itself which transforms and modes are active, and calls an op that has rules for them.
variable_list backward_in_python(const variable_list& tensors, const Tensor& plan) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("flash_attention::plain_backward", "");
    torch::jit::Stack stack(tensors.begin(), tensors.end());
    stack.insert(stack.end(), {plan, plan_in(plan).settings});
    op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
    return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), Tensor()};
}

struct PlainAttention : torch::autograd::Function<PlainAttention> {
    static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& plan) {
        Launch launch = plan_in(plan).forward;
        AttentionParams& p = launch.params;
        const Tensor O = launch.empty(p.o, p.H, p.Nq, p.Dv, q), LSE = at::empty({p.B, p.H, p.Nq}, q.options().dtype(at::kFloat));
        p.q.data = q.data_ptr(), p.k.data = k.data_ptr(), p.v.data = v.data_ptr(), p.lse = LSE.data_ptr<float>();
        launch(q);
        ctx->save_for_backward({q, k, v, O, LSE});
        ctx->saved_data["plan"] = plan;
        return O;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
        const Tensor plan = ctx->saved_data["plan"].toTensor();
        variable_list tensors = ctx->get_saved_variables();
        tensors.insert(tensors.begin(), gradients[0]);
        std::optional<Launch> launch = plan_in(plan).backward(tensors);
        if (!launch) return backward_in_python(tensors, plan);
        AttentionParams& p = launch->params;
        Tensor dO = tensors[0], q = tensors[1], k = tensors[2], v = tensors[3], O = tensors[4], LSE = tensors[5];
        if (!lies_as(p.d_o, dO)) dO = dO.clone(at::MemoryFormat::Contiguous);  // kernels cannot read it, as that of O.sum()
        const Tensor dQ = launch->empty(p.dq, p.H, p.Nq, p.D, q);
        const Tensor dK = launch->empty(p.dk, p.Hkv, p.Nk, p.D, q), dV = launch->empty(p.dv, p.Hkv, p.Nk, p.Dv, q);
        p.q.data = q.data_ptr(), p.k.data = k.data_ptr(), p.v.data = v.data_ptr(), p.o.data = O.data_ptr(), p.d_o.data = dO.data_ptr();
        p.lse = LSE.data_ptr<float>();
        (*launch)(q);
        return {dQ, dK, dV, Tensor()};  // the plan gets no gradient
    }
};

Tensor plain(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& plan) { return PlainAttention::apply(q, k, v, plan); }

TORCH_LIBRARY_FRAGMENT(flash_attention, m) {
    m.def("plain", plain);
    m.def("plain_plan", make_plan);
    m.def("plain_keep", keep_backward);
    m.def("plain_backward(Tensor dO, Tensor q, Tensor k, Tensor v, Tensor O, Tensor LSE, Tensor plan, str settings) -> (Tensor, Tensor, Tensor)");
}

}  // namespace
