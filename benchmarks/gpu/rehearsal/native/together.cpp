// operators.so as one unit: PyTorch's headers are nearly all that there is to compile, and are so once.
#include "operators.cpp"

#include "exchange.cpp"
#include "ghosts.cpp"
#include "kernels.cpp"
