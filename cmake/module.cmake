# The Python module pykd._C: kernels, and the glue that offers them to torch. setup.py says which torch:
#   PYKD_TORCH_DIR, PYKD_TORCH_VERSION, PYKD_TORCH_CUDA (empty: a CPU build)
set(reason "${PYKD_CUDA_REASON}")
if(PYKD_TORCH_CUDA STREQUAL "" AND NOT PYKD_CUDA STREQUAL "off")
  set(reason "this torch (${PYKD_TORCH_VERSION}) is a CPU build")
elseif(reason STREQUAL "")
  string(REGEX MATCH "^[0-9]+" major ${PYKD_TORCH_CUDA})
  if(NOT CUDAToolkit_VERSION_MAJOR EQUAL major)
    set(reason "nvcc is of CUDA ${CUDAToolkit_VERSION}, torch is built for CUDA ${PYKD_TORCH_CUDA}")
  endif()
endif()
pykd_say_cuda(pykd._C "${reason}")

file(GLOB PYKD_GLUE CONFIGURE_DEPENDS csrc/torch/*.cpp csrc/torch/ops/*.cpp)
file(GLOB PYKD_GLUE_CUDA CONFIGURE_DEPENDS csrc/torch/ops/*_cuda.cpp)
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

if(reason STREQUAL "")
  set(with_cuda 1)
  target_sources(_C PRIVATE ${PYKD_GLUE_CUDA} ${PYKD_CUDA_OBJECTS})
  # The toolkit's headers first; a slim toolkit lacks some of those that torch's headers name: its wheels carry them.
  target_include_directories(_C SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS}
    ${PYKD_TORCH_DIR}/../nvidia/cu${CUDAToolkit_VERSION_MAJOR}/include)
  target_link_libraries(_C PRIVATE ${PYKD_TORCH_DIR}/lib/libc10_cuda.so ${PYKD_TORCH_DIR}/lib/libtorch_cuda.so
    CUDA::cudart)  # shared: the one that torch has loaded
  set(PYKD_BUILT_CUDA "\"${PYKD_TORCH_CUDA}\"")
else()
  set(with_cuda 0)
  set(PYKD_BUILT_CUDA null)
endif()

set_property(SOURCE csrc/torch/module.cpp PROPERTY COMPILE_DEFINITIONS
  "PYKD_BUILD_TORCH=\"${PYKD_TORCH_VERSION}\";PYKD_WITH_CUDA=${with_cuda}"
  "PYKD_CUDA_REASON=\"${reason}\"")

# What pykd/_extension.py compares with the running torch before it loads pykd._C.
file(WRITE ${PYKD_OUTPUT}/_build_info.json
  "{\"torch\": \"${PYKD_TORCH_VERSION}\", \"cuda\": ${PYKD_BUILT_CUDA}}\n")
