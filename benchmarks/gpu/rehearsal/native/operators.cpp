// Every operator of the rehearsed device is the CPU's, on the same memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/library.h>

#include <set>
#include <string>

#include "exchange.h"
#include "ghosts.h"

namespace rehearsal {

namespace {

using Names = std::set<std::string>;

// Those that leave to the device's own what needs no kernel: memory and views of it. And those of kernels.cpp.
const Names LEFT_ALONE = {
    "aten::_has_same_storage_numel", "aten::_pin_memory",       "aten::_reshape_alias", "aten::alias",
    "aten::as_strided",              "aten::copy_",             "aten::detach",         "aten::empty",
    "aten::empty_strided",           "aten::is_pinned",         "aten::is_set_to",      "aten::record_stream",
    "aten::resize_",                 "aten::set_",              "aten::unfold",         "aten::view",
    "aten::view_as_complex",         "aten::view_as_real",      "aten::_fused_sdp_choice",
    "aten::_fused_rms_norm_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
};

// Those that choose a library of the device by themselves, so that no kernel is registered for it.
const Names TAKEN_TOO = {"aten::_convolution", "aten::convolution", "aten::convolution_backward", "aten::linalg_lstsq"};

// Those whose result, or its size, the host has to read.
const Names WAITS = {
    "aten::_local_scalar_dense", "aten::_unique",       "aten::_unique2", "aten::bincount",
    "aten::equal",               "aten::masked_select", "aten::nonzero",  "aten::repeat_interleave",
    "aten::unique_consecutive",  "aten::unique_dim",
    // Of decompositions, whether they came to an end.
    "aten::_linalg_eigh",        "aten::_linalg_svd",   "aten::linalg_lstsq",
};

// Those whose kernel adds up in no fixed order and has no other: "torch.use_deterministic_algorithms" lists them.
const Names UNORDERED = {
    "aten::_adaptive_avg_pool2d_backward",
    "aten::_adaptive_avg_pool3d_backward",
    "aten::_upsample_bicubic2d_aa_backward",
    "aten::_upsample_bilinear2d_aa_backward",
    "aten::adaptive_max_pool2d_backward",
    "aten::adaptive_max_pool3d_backward",
    "aten::avg_pool3d_backward",
    "aten::grid_sampler_2d_backward",
    "aten::grid_sampler_3d_backward",
    "aten::histc",
    "aten::kthvalue",
    "aten::max_pool3d_with_indices_backward",
    "aten::reflection_pad1d_backward",
    "aten::reflection_pad2d_backward",
    "aten::reflection_pad3d_backward",
    "aten::replication_pad1d_backward",
    "aten::replication_pad2d_backward",
    "aten::replication_pad3d_backward",
    "aten::upsample_bicubic2d_backward",
    "aten::upsample_bilinear2d_backward",
    "aten::upsample_linear1d_backward",
    "aten::upsample_trilinear3d_backward",
};

const Names INDEXED = {"aten::_index_put_impl_", "aten::_unsafe_index", "aten::index", "aten::index_put_"};

// A generator of the CPU at the place where the device's is, which then goes on, as it does after a kernel.
c10::IValue drawing(const c10::IValue& given) {
  at::Generator generator;
  if (given.isGenerator()) generator = given.toGenerator();
  if (!generator.defined()) generator = at::globalContext().defaultGenerator(at::Device(at::kCUDA));
  TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
              generator.device().type(), "'");
  std::lock_guard<std::mutex> guard(generator.mutex());
  const uint64_t offset = generator.get_offset();
  // CUDA's generators stand at multiples of four.
  generator.set_offset(offset + 4);
  return at::detail::createCPUGenerator(generator.current_seed() + offset * 0x9E3779B97F4A7C15ull);
}

// The result of the CPU: a view of an argument's memory becomes one of the argument, and all else is copied.
Tensor back_on(const Exchange& call, const Tensor& here) {
  if (!here.defined() || here.layout() != at::kStrided || here.numel() == 0) return on_device(here, call.device());
  char* pointer = static_cast<char*>(here.data_ptr());
  for (const auto& [there, _] : call.pairs()) {
    if (!there.defined() || !there.is_cuda() || there.numel() == 0) continue;
    char* begin = static_cast<char*>(there.storage().mutable_data());
    if (pointer < begin || pointer >= begin + there.storage().nbytes()) continue;
    const auto offset = (pointer - begin) / static_cast<int64_t>(here.element_size());
    Tensor view = at::empty({0}, here.options().device(there.device()));
    view.set_(there.storage(), offset, here.sizes(), here.strides());
    return view;
  }
  return on_device(here, call.device());
}

// An operator that resizes what it writes has moved the stand-in elsewhere.
void fetch(const Pair& written) {
  const auto& [there, here] = written;
  if (!there.is_cuda()) return;
  const bool moved = here.numel() > 0 && here.data_ptr() != there.data_ptr();
  if (there.sizes() == here.sizes() && !moved) return;
  there.resize_(here.sizes());
  if (here.numel() > 0) on_cpu(there).copy_(here);
}

// What a Boolean index chooses has a size that the device alone knows.
bool waits(const std::string& name, const Exchange& call) {
  if (WAITS.count(name)) return true;
  if (!INDEXED.count(name)) return false;
  // First what is indexed, last what is put there.
  const bool puts = name.find("put") != std::string::npos;
  for (size_t i = 1; i < call.pairs().size() - puts; i++) {
    const Tensor& index = call.pairs()[i].first;
    if (index.defined() && index.is_cuda() && index.scalar_type() == at::kBool) return true;
  }
  return false;
}

// Whether the device's kernel would refuse to be repeatable. Sums along a dimension are so of whole numbers alone.
bool unordered(const std::string& name, const Stack& stack, size_t arguments) {
  if (name != "aten::cumsum") return UNORDERED.count(name) > 0;
  const c10::IValue& summed = stack[stack.size() - arguments];
  return summed.isTensor() && summed.toTensor().is_floating_point();
}

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  const auto& schema = op.schema();
  if (unordered(schema.name(), *stack, schema.arguments().size())) {
    at::globalContext().alertNotDeterministic(schema.name() + " on CUDA");
  }
  if (ghosts::large(op, stack)) return ghosts::compute(op, stack);
  static const Exchange::StandIns by{at::kCPU, on_cpu, drawing};
  Exchange call(op, stack, by);
  if (waits(op.schema().name(), call)) c10::cuda::warn_or_error_on_sync();
  op.callBoxed(stack);
  call.for_written(fetch);
  call.give_back([&](const Tensor& here) { return back_on(call, here); });
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (!from.defined() || to.is_same(from)) return to;
  if (to.is_cuda() != from.is_cuda() && !non_blocking) c10::cuda::warn_or_error_on_sync();
  if (ghosts::large(to)) {
    ghosts::unwritten(to);
  } else {
    on_cpu(to).copy_(on_cpu(from));
  }
  return to;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("copy_", copy); }

}  // namespace rehearsal

/// Once torch is loaded: from here on its operators for a GPU are those above.
extern "C" void rehearsal_take_over() {
  using namespace rehearsal;
  static std::vector<c10::RegistrationHandleRAII> kept;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0 || LEFT_ALONE.count(name.name)) continue;
    auto op = dispatcher.findOp(name);
    if (!op || !op->hasSchema()) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) && !TAKEN_TOO.count(name.name)) continue;
    auto kernel = c10::KernelFunction::makeFromBoxedFunction<&compute>();
    kept.push_back(
        dispatcher.registerImpl(name, c10::DispatchKey::CUDA, kernel, std::nullopt, nullptr, "the rehearsal's"));
  }
}
