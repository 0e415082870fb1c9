#include "exchange.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAFunctions.h>

#include <set>

namespace rehearsal {

namespace {

// Whether an argument may be on the CPU beside one on a GPU: what is copied, and indices.
bool takes_both(const c10::FunctionSchema& schema, size_t argument) {
  static const std::set<std::string> copies = {"aten::_copy_from", "aten::copy_"};
  static const std::set<std::string> indexed = {
      "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::index", "aten::index_put_",
  };
  if (indexed.count(schema.name())) return schema.arguments()[argument].name() == "indices";
  return copies.count(schema.name()) > 0;
}

}  // namespace

Exchange::Exchange(const c10::OperatorHandle& op, Stack* stack, const StandIns& by)
    : schema_(op.schema()), stack_(stack), by_(by), of_(schema_.arguments().size()) {
  const size_t begin = stack->size() - of_.size();
  for (size_t i = 0; i < of_.size(); i++) replace((*stack)[begin + i], i);
  if (!device_) device_ = at::Device(at::kCUDA, c10::cuda::current_device());
}

Tensor Exchange::replaced(const Tensor& given, size_t argument) {
  if (given.defined() && given.is_cuda()) {
    TORCH_CHECK(!device_ || *device_ == given.device(), "Expected all tensors to be on the same device: ",
                schema_.name(), " of tensors on ", *device_, " and ", given.device());
    device_ = given.device();
  } else if (given.defined() && given.is_cpu() && given.dim() != 0) {
    TORCH_CHECK(takes_both(schema_, argument), "Expected all tensors to be on the same device: ", schema_.name(),
                " of a tensor on cpu, of sizes ", given.sizes(), ", beside one on cuda");
  }
  of_[argument].push_back(pairs_.size());
  return pairs_.emplace_back(given, by_.tensor(given)).second;
}

void Exchange::replace(c10::IValue& value, size_t argument) {
  const std::string& name = schema_.arguments()[argument].name();
  if (value.isTensor()) {
    value = replaced(value.toTensor(), argument);
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& each : value.toTensorVector()) list.push_back(replaced(each, argument));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& each : value.toOptionalTensorVector()) {
      list.push_back(each ? std::optional<Tensor>(replaced(*each, argument)) : std::nullopt);
    }
    value = list;
  } else if (value.isDevice() && value.toDevice().is_cuda()) {
    const at::Device asked = value.toDevice();
    if (!device_) device_ = at::Device(at::kCUDA, asked.has_index() ? asked.index() : c10::cuda::current_device());
    value = at::Device(by_.kind);
  } else if (name == "pin_memory") {
    value = c10::IValue();
  } else if (name == "generator") {
    // An operator's tensors come before its generator.
    if (!device_) device_ = at::Device(at::kCUDA, c10::cuda::current_device());
    value = by_.generator(value);
  }
}

void Exchange::for_written(const std::function<void(const Pair&)>& act) const {
  for (size_t i = 0; i < of_.size(); i++) {
    const auto* alias = schema_.arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    for (size_t index : of_[i]) {
      if (pairs_[index].first.defined()) act(pairs_[index]);
    }
  }
}

std::optional<Tensor> Exchange::written_as(const c10::AliasInfo& result) const {
  for (size_t i = 0; i < of_.size(); i++) {
    const auto* alias = schema_.arguments()[i].alias_info();
    if (alias && alias->isWrite() && *alias == result && of_[i].size() == 1) return pairs_[of_[i][0]].first;
  }
  return std::nullopt;
}

void Exchange::give_back(const std::function<Tensor(const Tensor&)>& back) {
  const auto& returns = schema_.returns();
  for (size_t r = 0; r < returns.size(); r++) {
    c10::IValue& value = (*stack_)[stack_->size() - returns.size() + r];
    const auto* alias = returns[r].alias_info();
    if (value.isTensor()) {
      auto same = alias && alias->isWrite() ? written_as(*alias) : std::nullopt;
      value = same ? *same : back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(back(each));
      value = list;
    }
  }
}

Tensor on_cpu(const Tensor& there) {
  if (!there.defined() || !there.is_cuda()) return there;
  if (there.layout() != at::kStrided) return there.cpu();
  const auto options = there.options().device(at::kCPU);
  if (there.numel() == 0) return at::empty_strided(there.sizes(), there.strides(), options);
  Tensor keep = there.detach();
  Tensor here = at::for_blob(there.data_ptr(), there.sizes())
                    .strides(there.strides())
                    .deleter([keep](void*) {})
                    .options(options)
                    .make_tensor();
  if (there.is_conj()) here._set_conj(true);
  if (there.is_neg()) here._set_neg(true);
  return here;
}

Tensor on_device(const Tensor& here, at::Device device) {
  if (!here.defined() || here.is_cuda()) return here;
  if (here.layout() != at::kStrided) return here.to(device);
  Tensor there = at::empty_strided(here.sizes(), here.strides(), here.options().device(device));
  if (here.numel() > 0) on_cpu(there).copy_(here);
  return there;
}

}  // namespace rehearsal
