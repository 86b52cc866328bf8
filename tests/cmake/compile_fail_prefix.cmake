# SPDX-License-Identifier: BSL-1.0
# cmake -DCOMPILER= -DCOMPILER_NAME= -DFLAGS= -DPREFIX=prefix.hpp -P compile_fail_prefix.cmake
# Precompiles what every file of tests/compile_fail/ includes first. Both compilers find PREFIX.gch by themselves
# when told to include PREFIX.
include(${CMAKE_CURRENT_LIST_DIR}/judge.cmake)

file(WRITE ${PREFIX} "#pragma once\n#include <vmstate/describe.hpp>\n")
execute_process(COMMAND ${COMPILER} ${judge_flags} -x c++-header ${PREFIX} -o ${PREFIX}.gch
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result STREQUAL "0")
    file(REMOVE ${PREFIX}.gch)
    message(NOTICE "${output}")
    message(FATAL_ERROR "<vmstate/describe.hpp> does not compile with ${COMPILER_NAME}")
endif()
