#!/usr/bin/env bash
# Another name of sample_img.sh.
exec "$(dirname -- "${BASH_SOURCE[0]}")/sample_img.sh" "$@"
