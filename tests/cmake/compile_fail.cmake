# SPDX-License-Identifier: BSL-1.0
# cmake -DCOMPILER= -DCOMPILER_NAME= -DFLAGS= -DSOURCE= -DPREFIX= -DPOSITIVE= -P compile_fail.cmake
#
# SOURCE says in one of its first lines what the compiler has to answer:
#     // EXPECT: a field is described twice
# It must be refused with that text in the answer, and must compile with VMSTATE_POSITIVE defined (the offending
# lines are inside #ifndef VMSTATE_POSITIVE), which shows that nothing else in it is wrong; asked if POSITIVE is on.
#
# What a page shows of a compiler's answer, it has to show rightly. Two more lines in SOURCE look after that:
#     // QUOTED BY: README.md
#     // g++: a_rule() [with Where = uart]
# The text must be in the answer of that compiler (COMPILER_NAME) and in the page.
include(${CMAKE_CURRENT_LIST_DIR}/judge.cmake)

file(READ ${SOURCE} beginning LIMIT 600)
if(NOT beginning MATCHES "(^|\n)// EXPECT: ([^\n]+)")
    message(FATAL_ERROR "${SOURCE}: none of its first lines is `// EXPECT: <message>`")
endif()
string(STRIP "${CMAKE_MATCH_2}" expected)
set(page "")
if(beginning MATCHES "\n// QUOTED BY: ([^\n]+)")
    set(page ${CMAKE_MATCH_1})
endif()

set(positive_code 0)
if(POSITIVE)
    judge(positive_code positive_output -include ${PREFIX} -DVMSTATE_POSITIVE ${SOURCE})
endif()
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

if(page)
    # Found by FIND: the names of compilers have characters that mean something in expressions.
    string(FIND "${beginning}" "\n// ${COMPILER_NAME}: " at)
    if(at EQUAL -1)
        return()
    endif()
    string(SUBSTRING "${beginning}" ${at} -1 quote)
    string(REGEX REPLACE "^\n// [^:]+: ([^\n]+).*" "\\1" quote "${quote}")
    file(READ ${CMAKE_CURRENT_LIST_DIR}/../../${page} text)
    foreach(where output text)
        string(FIND "${${where}}" "${quote}" at)
        if(at EQUAL -1)
            message(NOTICE "${output}")
            message(FATAL_ERROR "${SOURCE}: ${COMPILER_NAME} or ${page} does not say: ${quote}")
        endif()
    endforeach()
endif()
