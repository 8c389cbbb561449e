# The C++ tests of the kernels and of the engine on CUDA, with the kernels as nvcc compiles them, for a card: each test
# as it is, and under both tools of compute-sanitizer. `ctest -R memcheck` runs those.
#
# The target `cuda` makes the kernels' objects alone. What ptxas says of each kernel goes into the build's output, what
# nvcc makes on the way lies beside the objects: benchmarks/registers.py reads both.
enable_testing()
include(cmake/cuda.cmake)
if(NOT PYKD_CUDA_REASON STREQUAL "")
  message(FATAL_ERROR "The tests for a card need nvcc, but ${PYKD_CUDA_REASON}.")
endif()
list(APPEND PYKD_NVCC -Xptxas=-v --keep --keep-dir=${CMAKE_BINARY_DIR}/cuda)
pykd_cuda_objects(cuda ${PYKD_KERNELS_CUDA})
add_custom_target(cuda DEPENDS ${cuda})

find_package(Threads REQUIRED)
find_program(PYKD_SANITIZER compute-sanitizer HINTS ${CUDAToolkit_BIN_DIR})
add_compile_definitions(PYKD_CARD PYKD_WITH_CUDA=1)
pykd_isa_levels(levels kernels SOURCES ${PYKD_KERNELS})
add_library(others OBJECT ${PYKD_CORE} ${PYKD_ENGINE} ${PYKD_ENGINE_CUDA})
target_include_directories(others SYSTEM PRIVATE ${PYKD_JSON_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
target_compile_options(others PRIVATE ${PYKD_STRICT})

file(GLOB tests CONFIGURE_DEPENDS csrc/kernels/*/*_test.cpp csrc/runtime/*_cuda_test.cpp)
foreach(test IN LISTS tests)
  get_filename_component(name ${test} NAME_WE)
  add_executable(${name} ${test} ${levels} $<TARGET_OBJECTS:others> ${cuda})
  target_include_directories(${name} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_options(${name} PRIVATE ${PYKD_STRICT})
  target_link_libraries(${name} PRIVATE CUDA::cudart_static Threads::Threads)
  add_test(NAME ${name} COMMAND ${name})
  if(PYKD_SANITIZER)
    foreach(tool memcheck racecheck)
      add_test(NAME ${name}_${tool}
        COMMAND ${PYKD_SANITIZER} --tool ${tool} --error-exitcode 1 $<TARGET_FILE:${name}>)
    endforeach()
  endif()
endforeach()
