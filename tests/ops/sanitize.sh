#!/usr/bin/env bash
# Builds the native ops with AddressSanitizer and UndefinedBehaviorSanitizer and fuzzes them.
#
#     tests/ops/sanitize.sh PYTHON CALLS
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The builder takes any compiler; this one adds the sanitizers. TensorFlow's headers do not
# compile with the second one.
cat > "$folder/sanitizing-g++" <<'WRAPPER'
#!/bin/sh
case "$*" in
  *tensorflow/include*) sanitizers=address ;;
  *) sanitizers=address,undefined ;;
esac
exec g++ "$@" -g -O1 -fsanitize=$sanitizers -fno-sanitize-recover=all -fno-omit-frame-pointer
WRAPPER
chmod +x "$folder/sanitizing-g++"
export CXX="$folder/sanitizing-g++" TFMTSEG_CACHE_DIR="$folder/cache"

# Python itself is not built with them, so their libraries have to come first. Python and
# TensorFlow never free some of their memory.
libraries=
for name in libasan.so libubsan.so libstdc++.so.6; do
  libraries="$libraries:$(g++ -print-file-name=$name)"
done
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
LD_PRELOAD=${libraries#:} "$1" "$here/fuzz_ops.py" "$2"
