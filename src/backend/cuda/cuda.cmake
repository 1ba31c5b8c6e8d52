# The cuda backend: a static library of the room, and the plugin that is made from it. Each .cu file is one command of
# nvcc (by nvcc.sh, which refuses slow code): CMake 3.25 is older than the toolkits we build with and would want to know
# their compiler.
set(CUDAToolkit_NVCC_EXECUTABLE ${NVCC})
find_package(CUDAToolkit REQUIRED)
set(cuda_dir ${CMAKE_SOURCE_DIR}/src/backend/cuda)
set(cuda_flags -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -lineinfo -Werror all-warnings
    -Xcompiler=-Wall,-Wextra,-fPIC,-fvisibility=hidden)

file(GLOB cuda_c CONFIGURE_DEPENDS ${cuda_dir}/*.c)
file(GLOB cuda_cu CONFIGURE_DEPENDS ${cuda_dir}/*.cu)
list(REMOVE_ITEM cuda_c ${cuda_dir}/cu_plugin.c)
set(cuda_objects)
foreach(cu ${cuda_cu})
  get_filename_component(n ${cu} NAME)
  set(o ${CMAKE_BINARY_DIR}/cuda/${n}.o)
  add_custom_command(OUTPUT ${o} DEPENDS ${cu} ${cuda_dir}/nvcc.sh DEPFILE ${o}.d VERBATIM COMMENT "nvcc ${n}"
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
    COMMAND sh ${cuda_dir}/nvcc.sh ${o} ${NVCC} ${cuda_flags} -I${CMAKE_SOURCE_DIR}/src -MD -MF ${o}.d -c ${cu} -o ${o})
  list(APPEND cuda_objects ${o})
endforeach()
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)

set_target_properties(ern_base ern_model PROPERTIES POSITION_INDEPENDENT_CODE ON)
add_library(ern_backend_cuda STATIC ${cuda_c} ${cuda_objects})
target_link_libraries(ern_backend_cuda PUBLIC ern_model CUDA::cudart_static)
set_target_properties(ern_backend_cuda PROPERTIES POSITION_INDEPENDENT_CODE ON C_VISIBILITY_PRESET hidden
  LINKER_LANGUAGE CXX)
target_compile_options(ern_backend_cuda PRIVATE ${ERN_WARN})

# One symbol leaves it; what it brings along of base, model and the CUDA runtime stays its own.
add_library(ernest_cuda MODULE ${cuda_dir}/cu_plugin.c)
target_link_libraries(ernest_cuda PRIVATE ern_backend_cuda)
target_compile_options(ernest_cuda PRIVATE ${ERN_WARN})
target_link_options(ernest_cuda PRIVATE -Wl,--exclude-libs,ALL -Wl,-z,defs)
set_target_properties(ernest_cuda PROPERTIES PREFIX "" C_VISIBILITY_PRESET hidden LINKER_LANGUAGE CXX)
install(TARGETS ernest_cuda LIBRARY DESTINATION lib/ernest)
