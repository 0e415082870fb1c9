// Operators that a GPU has and a CPU has not: two of attention, and the backward pass of RMSNorm.
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "exchange.h"
#include "ghosts.h"

namespace rehearsal {

namespace {

using Scale = std::optional<double>;

// Where a kernel that drops values began to draw: nothing is dropped here.
Tensor no_draw(at::Device device) { return on_device(at::zeros({}, at::kLong), device); }

std::optional<Tensor> mask_of(const Tensor& bias) {
  return bias.defined() ? std::optional<Tensor>(on_cpu(bias)) : std::nullopt;
}

void check_no_dropout(double dropout) { TORCH_CHECK(dropout == 0, "the rehearsal has no dropout in attention"); }

// Memory of an attention's result: both kernels write it with the heads beside each other.
Tensor unwritten_attention(const Tensor& query, int64_t width) {
  Tensor found = at::empty({query.size(0), query.size(2), query.size(1), width}, query.options());
  return ghosts::unwritten(found).transpose(1, 2);
}

// Of its backward pass, with the gradient of the queries that is added up in fp32 beside what it gives.
std::tuple<Tensor, Tensor, Tensor> unwritten_gradients(const Tensor& query, const Tensor& key, const Tensor& value) {
  Tensor accumulated = at::empty(query.sizes(), query.options().dtype(at::kFloat));
  auto like = [](const Tensor& given) { return ghosts::unwritten(at::empty_like(given)); };
  return {like(query), like(key), like(value)};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad, const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& out, const Tensor& sums, bool causal,
                                             const std::optional<Tensor>& mask, Scale scale) {
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_cpu(grad), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(out), on_cpu(sums), 0, causal, mask, scale);
  const auto device = query.device();
  return {on_device(of_query, device), on_device(of_key, device), on_device(of_value, device)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash(
    const Tensor& query, const Tensor& key, const Tensor& value, double dropout, bool causal, bool, Scale scale) {
  at::AutoDispatchBelowAutograd below;
  check_no_dropout(dropout);
  const auto device = query.device();
  Tensor out, sums;
  if (ghosts::large(query)) {
    out = unwritten_attention(query, query.size(3));
    const auto options = query.options().dtype(at::kFloat);
    sums = ghosts::unwritten(at::empty({query.size(0), query.size(1), query.size(2)}, options));
  } else {
    auto found = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(query), on_cpu(key), on_cpu(value), 0, causal,
                                                                 std::nullopt, scale);
    out = on_device(std::get<0>(found), device);
    sums = on_device(std::get<1>(found), device);
  }
  Tensor no_mask = at::empty({0}, query.options());
  return {out, sums, Tensor(), Tensor(), query.size(2), key.size(2), no_draw(device), no_draw(device), no_mask};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                  const Tensor& value, const Tensor& out, const Tensor& sums,
                                                  const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double,
                                                  bool causal, const Tensor&, const Tensor&, Scale scale) {
  at::AutoDispatchBelowAutograd below;
  if (!ghosts::large(query)) return gradients(grad, query, key, value, out, sums, causal, std::nullopt, scale);
  // The products of result and gradient, by query.
  const auto options = query.options().dtype(at::kFloat);
  Tensor products = at::empty({query.size(0), query.size(1), query.size(2)}, options);
  return unwritten_gradients(query, key, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const std::optional<Tensor>& bias, bool, double dropout,
                                                     bool causal, Scale scale) {
  at::AutoDispatchBelowAutograd below;
  check_no_dropout(dropout);
  const auto device = query.device();
  if (ghosts::large(query)) {
    // The kernel takes the queries by 32.
    const int64_t rows = (query.size(2) + 31) / 32 * 32;
    Tensor sums = at::empty({query.size(0), query.size(1), rows}, query.options().dtype(at::kFloat));
    return {unwritten_attention(query, value.size(3)), sums, no_draw(device), no_draw(device)};
  }
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_cpu(query), on_cpu(key), on_cpu(value), 0, causal, bias ? mask_of(*bias) : std::nullopt, scale);
  return {on_device(out, device), on_device(sums, device), no_draw(device), no_draw(device)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(const Tensor& grad, const Tensor& query,
                                                              const Tensor& key, const Tensor& value,
                                                              const Tensor& bias, const Tensor& out,
                                                              const Tensor& sums, const Tensor&, const Tensor&, double,
                                                              std::array<bool, 4> wanted, bool causal, Scale scale) {
  at::AutoDispatchBelowAutograd below;
  TORCH_CHECK(!wanted[3], "the rehearsal has no gradient of an attention's bias");
  auto [of_query, of_key, of_value] =
      ghosts::large(query) ? unwritten_gradients(query, key, value)
                           : gradients(grad, query, key, value, out, sums, causal, mask_of(bias), scale);
  return {of_query, of_key, of_value, Tensor()};
}

// y = x r w with r = (mean x^2 + eps)^(-1/2), in fp32 as the kernel computes it.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, at::IntArrayRef normalized,
                                             const Tensor& rstd, const std::optional<Tensor>& weight,
                                             std::array<bool, 2> wanted) {
  at::AutoDispatchBelowAutograd below;
  const bool weighted = weight && weight->defined();
  const bool of_weight = wanted[1] && weighted;
  if (ghosts::large(input)) {
    return {wanted[0] ? ghosts::unwritten(at::empty_like(input)) : Tensor(),
            of_weight ? ghosts::unwritten(at::empty_like(*weight)) : Tensor()};
  }
  Tensor g = on_cpu(grad).to(at::kFloat);
  Tensor x = on_cpu(input).to(at::kFloat);
  Tensor r = on_cpu(rstd).to(at::kFloat);
  std::vector<int64_t> outer, inner;
  const int64_t first = input.dim() - static_cast<int64_t>(normalized.size());
  for (int64_t i = 0; i < input.dim(); i++) (i < first ? outer : inner).push_back(i);
  Tensor to_input, to_weight;
  if (wanted[0]) {
    Tensor scaled = weighted ? g * on_cpu(*weight).to(at::kFloat) : g;
    Tensor found = r * scaled - x * r.pow(3) * (scaled * x).mean(inner, true);
    to_input = on_device(found.to(input.scalar_type()), input.device());
  }
  if (of_weight) {
    Tensor each = g * x * r;
    Tensor found = outer.empty() ? each : each.sum(outer);
    to_weight = on_device(found.to(weight->scalar_type()), input.device());
  }
  return {to_input, to_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("_fused_rms_norm_backward", rms_norm_backward);
  library.impl("_scaled_dot_product_flash_attention", flash);
  library.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  library.impl("_scaled_dot_product_efficient_attention", efficient);
  library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward);
}

}  // namespace rehearsal
