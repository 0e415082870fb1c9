// CUDA's headers ask here which compilers they are for. The rehearsal needs no answer.
#pragma once
