# For aarch64 from another Linux: `cmake --toolchain cmake/aarch64.cmake`. qemu runs the tests, as the processor that
# QEMU_CPU names.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -L /usr/aarch64-linux-gnu)
# C++'s library stays shared: linked statically, the one of this compiler may ask for a newer C library than a device has
# (Debian 12's asks for glibc 2.36, JetPack 6 has 2.35).
