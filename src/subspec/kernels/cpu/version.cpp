// The interface version that kernels/native.py expects of a library.
extern "C" __attribute__((visibility("default"))) int subspec_interface_version() { return 8; }
