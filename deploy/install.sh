#!/bin/sh
# Installs peerup, or removes what it installed; called by `make install` and `make uninstall`.
#
#   PREFIX=/usr/local DESTDIR= PYTHON=python3 deploy/install.sh install|uninstall
#
# What goes where, below PREFIX:
#   lib/peerup/                      a virtual environment of its own: exactly the locked dependencies, no pip
#   bin/peerup, peerup-supervisor    start that environment's Python, isolated from the user's
#   lib/systemd/{system,user}/       the units; lib/sysusers.d/ the user of the system services
#   share/                           shell completion, licences
# lib/peerup/manifest lists the rest, and every directory that had to be made for it. `uninstall` removes these
# and nothing else: homes, keys and configurations are none of its business.
set -eu

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-python3}

fail() {
    echo "install: $1" >&2
    exit 1
}

case $PREFIX in
    *[[:space:]]* | *\|*) fail "PREFIX cannot hold blanks or '|': $PREFIX" ;;
    /*) ;;
    *) fail "PREFIX must be an absolute path, not '$PREFIX'" ;;
esac
PREFIX=${PREFIX%/}
root=$DESTDIR$PREFIX
home=$root/lib/peerup
manifest=$home/manifest
source=$(cd "$(dirname "$0")/.." && pwd)

# Everything that is made is noted, directories before what is in them.
make_directory() {
    if [ ! -d "$1" ]; then
        make_directory "$(dirname "$1")"
        mkdir "$1"
        case $1 in "$root"/*) echo "d ${1#"$root"/}" >>"$notes" ;; esac
    fi
}

put() { # put MODE FILE NAME: FILE becomes PREFIX/NAME
    make_directory "$(dirname "$root/$3")"
    install -m "$1" "$2" "$root/$3.new"
    mv -f "$root/$3.new" "$root/$3"
    echo "f $3" >>"$notes"
}

put_unit() { # put_unit FILE NAME
    sed "s|/usr/local/bin/|$PREFIX/bin/|" "$source/deploy/systemd/$1" >"$work/unit"
    put 644 "$work/unit" "lib/systemd/$2"
}

put_program() { # put_program NAME MODULE
    printf '#!%s/lib/peerup/bin/python -I\nimport sys\n\nfrom %s import main\n\nsys.exit(main())\n' "$PREFIX" "$2" >"$work/program"
    put 755 "$work/program" "bin/$1"
}

build() { # build DIRECTORY: a virtual environment with peerup and its locked dependencies, and nothing else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "peerup needs Python 3.11 or newer; $PYTHON is older"
    case $("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))') in
        /root/* | /home/*)
            echo "install: warning: $PYTHON is in a home directory, where the system services cannot run it;" >&2
            echo "  for these choose another, such as: make install PYTHON=/usr/bin/python3" >&2
            ;;
    esac
    # The tools that build and install stay out of it; they live in an environment that is thrown away.
    "$PYTHON" -m venv "$work/tools" ||
        fail "$PYTHON cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)"
    awk '/^[^ ]/ { ours = /^setuptools==/ } ours' "$source/requirements-dev.lock" >"$work/tools.lock"
    pip="$work/tools/bin/python -I -m pip --disable-pip-version-check --quiet --no-input"
    $pip install --require-hashes -r "$work/tools.lock"
    mkdir "$work/source"
    (cd "$source" && tar cf - --exclude=__pycache__ pyproject.toml README.md LICENSE-* actors peerup protocol supervisor) |
        tar xf - -C "$work/source"
    $pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" "$work/source"
    "$PYTHON" -m venv --without-pip "$1"
    $pip --python "$1/bin/python" install --no-compile --require-hashes -r "$source/requirements.lock"
    $pip --python "$1/bin/python" install --no-compile --no-deps --no-index --find-links "$work/wheels" peerup
    # Scripts of the environment name the place where it was built; the programs in PREFIX/bin do not.
    find "$1/bin" -mindepth 1 ! -name 'python*' -delete
    find "$1" -name pyvenv.cfg -exec sed -i '/^command/d' {} +
    # -s: the place where it was built is not where tracebacks should point to. -f: nor in what pip has compiled meanwhile.
    "$1/bin/python" -I -m compileall -q -f -s "$1" -p "$PREFIX/lib/peerup" "$1/lib" || fail "compiling failed"
}

remove_noted() { # remove_noted MANIFEST: all files in it, and its directories where they are empty
    sed -n 's/^f //p' "$1" | while IFS= read -r name; do rm -f "$root/$name"; done
    sed -n 's/^d //p' "$1" | sort -r | while IFS= read -r name; do
        rmdir "$root/$name" 2>/dev/null || true
    done
}

do_install() {
    umask 022
    work=$(mktemp -d "${TMPDIR:-/tmp}/peerup-install.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    notes=$work/manifest
    if [ -e "$home" ] && [ ! -f "$manifest" ]; then
        fail "$home exists and was not made by this; move it away first"
    fi
    if [ -f "$manifest" ]; then
        grep '^d ' "$manifest" >"$notes" || true # made by an earlier installation, and still ours to remove
    fi
    build "$work/environment"
    make_directory "$root/lib"
    # Units and programs last: what they name is there by then.
    rm -rf "$home.new"
    cp -a "$work/environment" "$home.new"
    [ ! -f "$manifest" ] || cp "$manifest" "$home.new/manifest"
    rm -rf "$home.old"
    [ ! -e "$home" ] || mv "$home" "$home.old"
    mv "$home.new" "$home"
    rm -rf "$home.old"
    put_program peerup peerup.cli
    put_program peerup-supervisor peerup.daemon
    put_unit peerup.service system/peerup.service
    put_unit peerup-relay.service system/peerup-relay.service
    put_unit peerup-user.service user/peerup.service
    put 644 "$source/deploy/systemd/peerup.sysusers" lib/sysusers.d/peerup.conf
    for shell in bash zsh fish; do
        "$home/bin/python" -I -m peerup completion "$shell" >"$work/completion"
        case $shell in
            bash) put 644 "$work/completion" share/bash-completion/completions/peerup ;;
            zsh) put 644 "$work/completion" share/zsh/site-functions/_peerup ;;
            fish) put 644 "$work/completion" share/fish/vendor_completions.d/peerup.fish ;;
        esac
    done
    for licence in LICENSE-MIT LICENSE-APACHE; do
        put 644 "$source/$licence" "share/doc/peerup/$licence"
    done
    if [ -f "$manifest" ]; then # what an older version had put and this one does not
        grep '^f ' "$manifest" | grep -vxFf "$notes" >"$work/outdated" || true
        remove_noted "$work/outdated"
    fi
    install -m 644 "$notes" "$manifest"
    echo "installed below $root: $("$home/bin/python" -I -m peerup version | head -n 1)"
}

do_uninstall() {
    [ -f "$manifest" ] || fail "nothing to remove: there is no $manifest (PREFIX and DESTDIR as at the installation?)"
    kept=$(mktemp "${TMPDIR:-/tmp}/peerup-manifest.XXXXXX")
    trap 'rm -f "$kept"' EXIT
    cp "$manifest" "$kept"
    rm -rf "$home"
    remove_noted "$kept"
    echo "removed from $root; homes of nodes and relays are untouched"
}

case ${1:-} in
    install) do_install ;;
    uninstall) do_uninstall ;;
    *) fail "say install or uninstall" ;;
esac
