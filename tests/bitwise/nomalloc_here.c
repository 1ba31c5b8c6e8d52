/* Here too, a sealed thread may not allocate: this time with the real backends. */
#include "sim/nomalloc.c"
