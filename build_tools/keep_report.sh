#!/bin/sh
# Runs a compiler and keeps what it says next to the object, as <object>.log: keep_report.sh nvcc ... -o <object> ...
# Only the words of a compiler that failed are shown.
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" > "$object.log" 2>&1 || { status=$?; cat "$object.log" >&2; rm -f "$object"; exit $status; }
