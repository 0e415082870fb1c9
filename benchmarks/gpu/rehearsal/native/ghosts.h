// Of what is too large to compute here, the memory alone: with REHEARSAL_GHOST=N, the results of operators of more than
// N values are allocated and never written, so that real sizes run through torch's own allocator.
#pragma once

#include "exchange.h"

namespace rehearsal::ghosts {

/// Whether `tensor` has more than N values.
bool large(const Tensor& tensor);
/// Whether a call with these arguments is to be a ghost. Never, where its values decide what happens next.
bool large(const c10::OperatorHandle& op, Stack* stack);
/// Runs the operator for its shapes alone.
void compute(const c10::OperatorHandle& op, Stack* stack);
/// The same tensor, all zeros, with its memory given back to the system.
Tensor unwritten(const Tensor& tensor);

}  // namespace rehearsal::ghosts
