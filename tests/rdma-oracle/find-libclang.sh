#!/usr/bin/env bash
# Prints the path of a libclang that the crate rdma-sys can make its bindings with; fails where there is none.
#
#   tests/rdma-oracle/find-libclang.sh [any]
#
# Each libclang is asked itself rather than its package: it is loaded, has to say its version, and to read a C file that
# includes a header of clang's own (a library without them is of no use). The bindgen that rdma-sys 0.3 is tied to does
# not understand clang 16 and later; with `any` those count too.
set -euo pipefail
newest=15
if [ "${1:-}" = any ]; then newest=1000000; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cat >"$scratch/ask.c" <<'PROGRAM'
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of clang-c/Index.h. */
struct string { const void *data; unsigned flags; };
struct file { const char *name, *text; unsigned long len; };

/* ask LIBRARY: prints the major version; fails unless the library reads a header of clang's own. */
int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) return 1;
    void *(*index)(int, int) = dlsym(library, "clang_createIndex");
    void *(*parse)(void *, const char *, const char *const *, int, struct file *, unsigned, unsigned) =
        dlsym(library, "clang_parseTranslationUnit");
    unsigned (*complaints)(void *) = dlsym(library, "clang_getNumDiagnostics");
    struct string (*version)(void) = dlsym(library, "clang_getClangVersion");
    const char *(*text)(struct string) = dlsym(library, "clang_getCString");
    if (!index || !parse || !complaints || !version || !text) return 1;
    const char program[] = "#include <stddef.h>\nsize_t asked;\n";
    struct file file = {"ask.c", program, sizeof program - 1};
    void *unit = parse(index(0, 0), file.name, NULL, 0, &file, 1, 0);
    if (!unit || complaints(unit) != 0) return 1;
    const char *number = strstr(text(version()), "version ");
    if (!number) return 1;
    printf("%d\n", atoi(number + 8));
    return 0;
}
PROGRAM
cc -o "$scratch/ask" "$scratch/ask.c" -ldl

for library in ${LIBCLANG_PATH:+"$LIBCLANG_PATH" "$LIBCLANG_PATH"/libclang*.so*} /usr/lib/llvm-*/lib/libclang*.so* \
    /usr/lib/*/libclang*.so* /usr/lib/libclang*.so* /usr/lib64/libclang*.so* /usr/local/lib/libclang*.so*; do
    # The C++ interface has a name that looks alike.
    if [ ! -f "$library" ] || [[ $library == *-cpp* ]]; then continue; fi
    if version=$("$scratch/ask" "$library" 2>/dev/null) && [ "$version" -le "$newest" ]; then
        echo "$library"
        exit 0
    fi
done
exit 1
