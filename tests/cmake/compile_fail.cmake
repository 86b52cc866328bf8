# SPDX-License-Identifier: BSL-1.0
# cmake -DCOMPILER= -DCOMPILER_NAME= -DFLAGS= -DSOURCE= -DPREFIX= -P compile_fail.cmake
#
# SOURCE says in one of its first lines what the compiler has to answer:
#     // EXPECT: a field is described twice
# It must be refused with that text in the answer, and must compile with VMSTATE_POSITIVE defined (the offending
# lines are inside #ifndef VMSTATE_POSITIVE), which shows that nothing else in it is wrong.
include(${CMAKE_CURRENT_LIST_DIR}/judge.cmake)

file(READ ${SOURCE} beginning LIMIT 600)
if(NOT beginning MATCHES "(^|\n)// EXPECT: ([^\n]+)")
    message(FATAL_ERROR "${SOURCE}: none of its first lines is `// EXPECT: <message>`")
endif()
string(STRIP "${CMAKE_MATCH_2}" expected)

judge(positive_code positive_output -include ${PREFIX} -DVMSTATE_POSITIVE ${SOURCE})
if(NOT positive_code STREQUAL "0")
    message(NOTICE "${positive_output}")
    message(FATAL_ERROR "${SOURCE}: with VMSTATE_POSITIVE it should compile")
endif()

judge(code output -include ${PREFIX} ${SOURCE})
if(code STREQUAL "0")
    message(FATAL_ERROR "${SOURCE}: ${COMPILER_NAME} accepted it; it should say: ${expected}")
endif()
string(FIND "${output}" "${expected}" at)
if(at EQUAL -1)
    message(NOTICE "${output}")
    message(FATAL_ERROR "${SOURCE}: refused, but without saying: ${expected}")
endif()
