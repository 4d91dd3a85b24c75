# The three kinds of target. Warnings are errors in our code; generated code is built by proto/ without them.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

find_program(LONGSPAN_CCACHE ccache)
if(LONGSPAN_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER
      ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${LONGSPAN_CCACHE})
endif()
find_program(LONGSPAN_MOLD mold)
if(LONGSPAN_MOLD)
  add_link_options(-fuse-ld=mold)
endif()

if(LONGSPAN_SANITIZE)
  string(REPLACE ";" "," LONGSPAN_SANITIZE_FLAG "${LONGSPAN_SANITIZE}")
  # Without recovery, so that undefined behaviour fails a test instead of printing a line in it.
  # GCC 12 finds uninitialised members in its own <regex> when it instruments it.
  add_compile_options(-fsanitize=${LONGSPAN_SANITIZE_FLAG} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
                      $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  add_link_options(-fsanitize=${LONGSPAN_SANITIZE_FLAG})
  if("thread" IN_LIST LONGSPAN_SANITIZE)
    # Protobuf's headers add members to its map fields under this macro, but the distribution's library is built without
    # them: a message with a map would be destroyed wrongly. The standard library and the tests are told by macros of their own.
    add_compile_options(-U__SANITIZE_THREAD__ -D_GLIBCXX_TSAN=1 -DLONGSPAN_TSAN=1)
  endif()
endif()

add_library(longspan_flags INTERFACE)
target_compile_options(longspan_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor;-Werror>
  # 177 is what one instance of a template leaves unused.
  $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;--diag-suppress=177;-Xcompiler=-Wall,-Wextra>)
target_include_directories(longspan_flags INTERFACE ${CMAKE_SOURCE_DIR})

# longspan_library(name SOURCES ... HEADERS ... DEPENDS ...): headers must compile alone (target all_verify_interface_header_sets).
function(longspan_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;HEADERS;DEPENDS" ${ARGN})
  if(ARG_SOURCES)
    add_library(${name} STATIC ${ARG_SOURCES})
    set(scope PUBLIC)
  else()
    add_library(${name} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_sources(${name} ${scope} FILE_SET HEADERS BASE_DIRS ${CMAKE_SOURCE_DIR} FILES ${ARG_HEADERS})
  target_link_libraries(${name} ${scope} ${ARG_DEPENDS})
  if(ARG_SOURCES)
    target_link_libraries(${name} PRIVATE longspan_flags)
    target_include_directories(${name} PUBLIC ${CMAKE_SOURCE_DIR})
  else()
    target_include_directories(${name} INTERFACE ${CMAKE_SOURCE_DIR})
  endif()
  set_target_properties(${name} PROPERTIES VERIFY_INTERFACE_HEADER_SETS ON)
endfunction()

# longspan_binary(name SOURCES ... DEPENDS ...)
function(longspan_binary name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_DEPENDS} longspan_flags)
endfunction()

# longspan_test(folder.unit SOURCES ... DEPENDS ... [LABELS ...] [TIMEOUT s]); the target tests_<folder> builds a folder's tests.
function(longspan_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPENDS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  longspan_binary(${name} SOURCES ${ARG_SOURCES} DEPENDS ${ARG_DEPENDS} GTest::gtest GTest::gmock GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  string(REGEX REPLACE "\\..*" "" folder ${name})
  if(NOT TARGET tests_${folder})
    add_custom_target(tests_${folder})
  endif()
  add_dependencies(tests_${folder} ${name})
endfunction()

# longspan_python_test(folder.unit FILES ... [LABELS ...] [TIMEOUT s]): pytest over the files, in the virtual environment
# that tests/run makes. $LONGSPAN_BINARY is the command-line tool of this build, $LONGSPAN_BINARY_DIR its folder.
function(longspan_python_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "FILES;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  list(TRANSFORM ARG_FILES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
  add_test(NAME ${name}
    COMMAND ${CMAKE_SOURCE_DIR}/build/venv/bin/python -m pytest -q -p no:cacheprovider ${ARG_FILES}
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES
    LABELS "python;${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
    ENVIRONMENT "LONGSPAN_BINARY=${CMAKE_RUNTIME_OUTPUT_DIRECTORY}/longspan;LONGSPAN_BINARY_DIR=${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
endfunction()
