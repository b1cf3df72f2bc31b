"""What the shells of a box without Python are told to do. Law: POSIX only, and no program but those that are named
here; what the host goes by is an exit code of ours or a mark that is another one each time.
"""

from __future__ import annotations

KEEPER = """
if command -v timeout >/dev/null 2>&1; then
  while timeout "$1" sh -c 'read -r beat'; do :; done
else
  while read -r beat; do :; done
fi
"""
# cd first, so that a missing directory can be told from a failing command. What comes before the mark on both outputs
# is the command's, and all of it, however late it comes; what its children write later is not waited for. The shell's
# own words ("Killed") are nobody's output.
RUN = """
mark=$1; shift
if [ -n "$1" ] && ! CDPATH= cd -- "$1" 2>/dev/null; then printf %s "$mark" >&2; exit 125; fi
shift
unset HOSTNAME
exec 3>&2 2>/dev/null
(exec 2>&3 3>&-; exec "$@")
code=$?
printf %s "$mark"; printf %s "$mark" >&3
exit $code
"""
READ = """
[ -e "$1" ] || exit 91
[ -f "$1" ] || exit 92
size=$(wc -c < "$1" 2>/dev/null)
[ "${size:-0}" -le "$2" ] || exit 93
exec cat -- "$1"
"""
# what comes before a mark that nothing in the box can guess came whole, however its connection ended
WHOLE = 'mark=$1; shift; "$@" && printf %s "$mark"'
WRITE = """
[ ! -e "$1" ] || [ -f "$1" ] || exit 92
cat > "$1" || exit 1
size=$(wc -c < "$1" 2>/dev/null)
[ "${size:-$2}" -ge "$2" ] || exit 94
"""
