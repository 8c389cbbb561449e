# The Python module pykd._C: kernels, and the glue that offers them to torch. setup.py says which torch:
#   PYKD_TORCH_DIR, PYKD_TORCH_VERSION, PYKD_TORCH_CUDA (empty: a CPU build)
#   PYKD_CUDA on|off|auto; PYKD_CUDA_ARCHS: empty, "all", "native" or a list such as "87;110"
include(cmake/cuda.cmake)

file(GLOB PYKD_GLUE CONFIGURE_DEPENDS csrc/torch/*.cpp csrc/torch/ops/*.cpp)
file(GLOB PYKD_GLUE_CUDA CONFIGURE_DEPENDS csrc/torch/ops/*_cuda.cpp)
file(GLOB PYKD_KERNELS_CUDA CONFIGURE_DEPENDS csrc/kernels/*/*_cuda.cu)
list(REMOVE_ITEM PYKD_GLUE ${PYKD_GLUE_CUDA})

set(PYKD_TORCH_INCLUDE ${PYKD_TORCH_DIR}/include)  # pybind11's headers lie there, too

add_library(_C MODULE ${PYKD_GLUE} ${PYKD_KERNEL_OBJECTS} $<TARGET_OBJECTS:core>)
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX ${PYKD_SUFFIX} LIBRARY_OUTPUT_DIRECTORY ${PYKD_OUTPUT})
target_include_directories(_C SYSTEM PRIVATE ${PYKD_TORCH_INCLUDE} ${PYKD_PYTHON_INCLUDE})
target_compile_options(_C PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-fvisibility=hidden -Wall -Wextra -ffile-prefix-map=${PYKD_TORCH_INCLUDE}/=
  -ffile-prefix-map=${PYKD_PYTHON_INCLUDE}/=>)
# at::parallel_for is OpenMP in its caller, and serial without this flag. It is not linked: the runtime must be the one
# that torch brings, whose number of threads torch.set_num_threads sets.
set_source_files_properties(${PYKD_GLUE} PROPERTIES COMPILE_OPTIONS -fopenmp)
target_link_options(_C PRIVATE -s -Wl,--as-needed)
foreach(library c10 torch torch_cpu torch_python)
  target_link_libraries(_C PRIVATE ${PYKD_TORCH_DIR}/lib/lib${library}.so)
endforeach()

if(PYKD_WITH_CUDA)
  add_library(kernels_cuda OBJECT ${PYKD_KERNELS_CUDA})
  set_target_properties(kernels_cuda PROPERTIES CUDA_ARCHITECTURES "${PYKD_CUDA_ARCHITECTURES}")
  target_compile_options(kernels_cuda PRIVATE --Wno-deprecated-gpu-targets --threads=0
    -Xcompiler=-fvisibility=hidden,-Wall,-Wextra $<$<BOOL:${PYKD_WERROR}>:--Werror=all-warnings>)
  target_sources(_C PRIVATE ${PYKD_GLUE_CUDA} $<TARGET_OBJECTS:kernels_cuda>)
  # The toolkit's headers first; a slim toolkit lacks some of those that torch's headers name: its wheels carry them.
  target_include_directories(_C SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS}
    ${PYKD_TORCH_DIR}/../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/include)
  target_link_libraries(_C PRIVATE
    ${PYKD_TORCH_DIR}/lib/libc10_cuda.so ${PYKD_TORCH_DIR}/lib/libtorch_cuda.so CUDA::cudart)
  set(PYKD_BUILT_CUDA "\"${PYKD_TORCH_CUDA}\"")
else()
  set(PYKD_BUILT_CUDA null)
endif()

set_property(SOURCE csrc/torch/module.cpp PROPERTY COMPILE_DEFINITIONS
  "PYKD_BUILD_TORCH=\"${PYKD_TORCH_VERSION}\";PYKD_WITH_CUDA=${PYKD_WITH_CUDA}"
  "PYKD_CUDA_REASON=\"${PYKD_CUDA_REASON}\"")

# What pykd/_extension.py compares with the running torch before it loads pykd._C.
file(WRITE ${PYKD_OUTPUT}/_build_info.json
  "{\"torch\": \"${PYKD_TORCH_VERSION}\", \"cuda\": ${PYKD_BUILT_CUDA}}\n")
