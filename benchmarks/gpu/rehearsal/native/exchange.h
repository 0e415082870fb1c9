// The tensors of an operator's call, each with what stands in for it while another device's operator runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace rehearsal {

using at::Tensor;
using torch::jit::Stack;

/// A tensor of the call, and what stands in for it.
using Pair = std::pair<Tensor, Tensor>;

class Exchange {
 public:
  /// What stands in for a tensor, of the device `kind`; and for a generator, where the operator draws.
  struct StandIns {
    c10::DeviceType kind;
    std::function<Tensor(const Tensor&)> tensor;
    std::function<c10::IValue(const c10::IValue&)> generator;
  };

  /// Replaces the arguments on `stack`.
  ///
  /// Throws where tensors of several devices are among them, as the operator of a GPU does.
  Exchange(const c10::OperatorHandle& op, Stack* stack, const StandIns& by);

  /// The device of the call: its tensors', or the one asked for, or the current one.
  at::Device device() const { return *device_; }
  const std::vector<Pair>& pairs() const { return pairs_; }

  /// Of arguments that the operator writes.
  void for_written(const std::function<void(const Pair&)>& act) const;
  /// Replaces the results on the stack by what `back` gives of them; one that is an argument, by that argument.
  void give_back(const std::function<Tensor(const Tensor&)>& back);

 private:
  Tensor replaced(const Tensor& given, size_t argument);
  void replace(c10::IValue& value, size_t argument);
  std::optional<Tensor> written_as(const c10::AliasInfo& result) const;

  const c10::FunctionSchema& schema_;
  Stack* stack_;
  const StandIns& by_;
  std::optional<at::Device> device_;
  std::vector<Pair> pairs_;
  // By argument, which of the pairs are its.
  std::vector<std::vector<size_t>> of_;
};

/// The same memory as a tensor of the CPU; what is no tensor of a GPU is given back.
Tensor on_cpu(const Tensor& there);
/// A copy on `device`.
Tensor on_device(const Tensor& here, at::Device device);

}  // namespace rehearsal
