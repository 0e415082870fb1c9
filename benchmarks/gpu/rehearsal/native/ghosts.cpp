#include "ghosts.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sys/mman.h>

#include "refuse.h"

namespace rehearsal::ghosts {

namespace {

// Comparisons and what is made of them, sizes that values decide, and decompositions that fail on zeros.
const std::set<std::string> COMPUTED = {
    "aten::_linalg_eigh", "aten::_local_scalar_dense", "aten::_unique2",     "aten::all",         "aten::any",
    "aten::bitwise_and",  "aten::bitwise_not",         "aten::eq",           "aten::equal",       "aten::ge",
    "aten::gt",           "aten::index",               "aten::isfinite",     "aten::isnan",       "aten::le",
    "aten::linalg_eigh",  "aten::logical_and",         "aten::logical_not",  "aten::logical_or",  "aten::lt",
    "aten::masked_select", "aten::ne",                 "aten::nonzero",
};

// Whose result may be larger than anything that they are given.
const std::set<std::string> BROADCAST = {"aten::add", "aten::div", "aten::mul", "aten::sub", "aten::where"};

// None: nothing is a ghost.
int64_t threshold() {
  static const int64_t values = [] {
    const char* text = getenv("REHEARSAL_GHOST");
    const int64_t asked = text ? atoll(text) : -1;
    if (text && asked <= 0) refuse("REHEARSAL_GHOST is no whole number above 0");
    return asked;
  }();
  return values;
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t values = 1;
  for (int64_t size : sizes) values *= size;
  return values;
}

Tensor shape_of(const Tensor& there) {
  if (!there.defined()) return there;
  return at::empty_strided(there.sizes(), there.strides(), there.options().device(at::kMeta));
}

// An argument, a view of one, or new memory.
Tensor back_on(const Exchange& call, const Tensor& shape) {
  if (!shape.defined() || !shape.is_meta()) return shape;
  for (const auto& [there, old] : call.pairs()) {
    if (!there.defined() || there.numel() == 0) continue;
    if (old.is_same(shape)) return there;
    if (old.storage().unsafeGetStorageImpl() != shape.storage().unsafeGetStorageImpl()) continue;
    Tensor view = at::empty({0}, shape.options().device(there.device()));
    const auto offset = there.storage_offset() + shape.storage_offset();
    view.set_(there.storage(), offset, shape.sizes(), shape.strides());
    return view;
  }
  const auto options = shape.options().device(call.device());
  return unwritten(at::empty_strided(shape.sizes(), shape.strides(), options));
}

}  // namespace

bool large(const Tensor& tensor) { return threshold() >= 0 && tensor.defined() && tensor.numel() > threshold(); }

bool large(const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  if (threshold() < 0 || COMPUTED.count(name)) return false;
  // What is made without a tensor: by the first argument's sizes.
  const bool sized = name.find("size") != std::string::npos;
  const size_t begin = stack->size() - op.schema().arguments().size();
  int64_t most = 0;
  std::vector<int64_t> together;
  for (size_t i = begin; i < stack->size(); i++) {
    const c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined()) {
      const Tensor& given = value.toTensor();
      if (given.scalar_type() == at::kBool && name != "aten::where") return false;
      most = std::max(most, given.numel());
      if (BROADCAST.count(name)) together = at::infer_size(together, given.sizes());
    } else if (value.isTensorList()) {
      for (const Tensor& given : value.toTensorVector()) {
        if (given.defined()) most = std::max(most, given.numel());
      }
    } else if (value.isIntList() && (sized || i == begin)) {
      most = std::max(most, product(value.toIntVector()));
    }
  }
  return std::max(most, product(together)) > threshold();
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto no_generator = [](const c10::IValue&) { return c10::IValue(); };
  const Exchange::StandIns by{at::kMeta, shape_of, no_generator};
  Exchange call(op, stack, by);
  op.callBoxed(stack);
  call.for_written([](const Pair& written) {
    const auto& [there, shape] = written;
    if (there.sizes() != shape.sizes()) there.resize_(shape.sizes());
  });
  call.give_back([&](const Tensor& shape) { return back_on(call, shape); });
}

Tensor unwritten(const Tensor& tensor) {
  if (tensor.numel() == 0 || !tensor.is_non_overlapping_and_dense()) return tensor;
  constexpr uintptr_t PAGE = 4096;
  char* begin = static_cast<char*>(tensor.data_ptr());
  char* end = begin + tensor.nbytes();
  char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + PAGE - 1) / PAGE * PAGE);
  char* last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / PAGE * PAGE);
  if (first >= last || !tensor.is_cuda()) {
    memset(begin, 0, end - begin);
    return tensor;
  }
  memset(begin, 0, first - begin);
  memset(last, 0, end - last);
  // Whole pages are zeros again when they are next read.
  madvise(first, last - first, MADV_DONTNEED);
  return tensor;
}

}  // namespace rehearsal::ghosts
