/* Stands for libcuda.so.1: that it is there is all that is asked of it. */
extern const int no_driver;
const int no_driver = 1;
