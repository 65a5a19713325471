#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Checks what each static library of src/ takes from outside (rule S1).

    check-symbols.py BUILDDIR [--allow FILE] [--layers FILE]

From base to control only src/loop may touch time, randomness, threads, files, sockets, memory mappings, processes or
signals, because everything else must run under the simulator: then a seed decides all that happens. This program
asks nm which symbols each library needs that are not its own, and reports those that are on the list below. What is
allowed nevertheless stands in tools/symbols-allowed, by source file and with its reason; an entry that nothing uses any
more is a finding too. Instructions that reach the same things without a symbol (rdtsc, rdrand, syscall) are looked for in
the disassembly.

It also reports a symbol that a folder takes from one that it may not see (tools/layers), for which a declaration by
hand would be enough to go round check-layers.py.
"""
import argparse
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import layers  # noqa: E402

FREE = {"loop"}  # S1: the one place
LAST = "control"  # daemon, client and cli are outside the rule

# By category: names, or patterns that match a whole name. Variants are removed first, see plain_name().
DENIED = {
    "time": r"""
        time times clock clock_\w+ gettimeofday settimeofday adjtime\w* ntp_\w+ ftime stime
        sleep usleep nanosleep alarm ualarm setitimer getitimer timer_\w+ timerfd_\w+ timespec_get
        localtime localtime_r gmtime gmtime_r ctime ctime_r mktime timegm timelocal strftime strptime tzset tzname
        timezone daylight utime utimes utimensat futimens futimes lutimes""",
    "randomness": r"""
        rand rand_r srand random random_r srandom srandom_r initstate\w* setstate\w* [dejlmn]rand48(_r)?
        srand48(_r)? seed48(_r)? lcong48(_r)? getrandom getentropy arc4random\w* uuid_generate\w* uuid_create\w*
        RAND_\w+ gnutls_rnd gcry_randomize gcry_random_\w+ gcry_create_nonce getauxval""",
    "threads": r"""
        pthread_\w+ thrd_\w+ mtx_\w+ cnd_\w+ tss_\w+ call_once sem_\w+ clone clone3 fork _Fork vfork sched_\w+
        gettid getcpu membarrier futex set_robust_list
        makecontext swapcontext getcontext setcontext""",
    "files": r"""
        open openat openat2 creat close closefrom close_range fopen fdopen freopen fclose fcloseall fflush\w*
        fread\w* fwrite\w* fgets\w* fgetc\w* getc getc_unlocked getchar\w* getw getline getdelim fputs\w* fputc\w*
        putc putc_unlocked putchar\w* puts puts_unlocked putw ungetc printf vprintf fprintf vfprintf dprintf
        vdprintf perror psignal psiginfo scanf vscanf fscanf vfscanf fseek fseeko ftell ftello rewind fgetpos fsetpos
        fileno\w* setbuf setbuffer setlinebuf setvbuf fopencookie fmemopen open_memstream popen pclose tmpfile
        tmpnam\w* tempnam mktemp mkstemp\w* mkostemp\w* mkdtemp stdin stdout stderr
        read write pread\w* pwrite\w* readv writev lseek llseek fsync fdatasync sync syncfs sync_file_range
        truncate ftruncate fallocate posix_fallocate posix_fadvise readahead copy_file_range splice vmsplice tee
        stat fstat lstat fstatat fxstat xstat lxstat fxstatat statx statfs fstatfs statvfs fstatvfs
        access faccessat eaccess euidaccess chmod fchmod fchmodat chown fchown lchown fchownat umask mknod\w* mkfifo\w*
        link linkat symlink symlinkat readlink readlinkat unlink unlinkat rename renameat renameat2 remove
        mkdir mkdirat rmdir opendir fdopendir readdir readdir_r rewinddir closedir seekdir telldir dirfd scandir\w*
        alphasort versionsort getdents getdirentries nftw ftw fts_\w+ glob globfree wordexp realpath
        canonicalize_file_name chdir fchdir getcwd get_current_dir_name getwd chroot pivot_root mount umount umount2
        dup dup2 dup3 pipe pipe2 fcntl ioctl flock lockf inotify_\w+ fanotify_\w+ \w*xattr name_to_handle_at
        open_by_handle_at aio_\w+ lio_listio io_setup io_submit io_getevents io_cancel io_destroy io_uring_\w+
        isatty ttyname\w* tcgetattr tcsetattr memfd_create memfd_secret
        dlopen dlmopen dlsym dlvsym dlclose syslog vsyslog openlog closelog
        pathconf fpathconf getenv secure_getenv putenv setenv unsetenv clearenv environ""",
    "sockets": r"""
        socket socketpair bind listen accept accept4 connect shutdown send sendto sendmsg sendmmsg recv recvfrom recvmsg
        recvmmsg getsockopt setsockopt getsockname getpeername sendfile getaddrinfo\w* freeaddrinfo getnameinfo
        gethostby\w+ gethostname getservby\w+ getprotoby\w+ if_nametoindex if_indextoname getifaddrs
        select pselect poll ppoll epoll_\w+ eventfd eventfd_read eventfd_write signalfd""",
    "memory mappings": r"""
        mmap mmap2 munmap mremap mprotect pkey_\w+ msync madvise posix_madvise process_madvise mlock mlock2 mlockall
        munlock munlockall mincore remap_file_pages brk sbrk shm_open shm_unlink shmget shmat shmdt shmctl
        semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_\w+ userfaultfd""",
    "processes and signals": r"""
        exec\w+ fexecve posix_spawn\w* system wait waitpid waitid wait3 wait4 exit _exit _Exit quick_exit atexit
        on_exit at_quick_exit kill killpg tgkill raise signal sigaction sigprocmask sigsuspend sigwait\w* sigqueue
        sigaltstack sigpending sigpause pause bsd_signal sysv_signal
        getpid getppid getuid geteuid getgid getegid setuid setgid setsid setpgid prctl arch_prctl ptrace syscall
        daemon getrlimit setrlimit prlimit getrusage sysconf get_nprocs\w* getpagesize sysinfo uname pidfd_\w+
        setns unshare capget capset bpf perf_event_open personality reboot nice getpriority setpriority""",
}

INSTRUCTIONS = re.compile(r"\t(rdtscp?|rdrand|rdseed|syscall|sysenter|int +\$0x80)\b")


def compile_denied():
    return [
        (category, re.compile("(?:" + "|".join(patterns.split()) + r")\Z"))
        for category, patterns in DENIED.items()
    ]


def plain_name(symbol):
    """open64 -> open, __read_chk -> read, __isoc99_fscanf -> fscanf, __errno_location@GLIBC_2.2.5 -> itself."""
    name = symbol.split("@")[0]
    if match := re.fullmatch(r"__isoc\d+_(\w+)", name):
        name = match.group(1)
    if match := re.fullmatch(r"__(\w+)_chk", name):
        name = match.group(1)
    if match := re.fullmatch(r"__(\w+?)(?:_time64|_2)", name):  # __openat_2, __clock_gettime_time64
        name = match.group(1)
    if match := re.fullmatch(r"(\w+?)64(v\d)?(_\w+)?", name):  # pread64, preadv64v2, fopen64
        name = match.group(1) + (match.group(2) or "") + (match.group(3) or "")
    return name


def denied_category(symbol, denied):
    plain = plain_name(symbol)
    # __libc_open, __open, __pthread_create and the like are the same call under another name.
    for name in {symbol, plain, re.sub(r"\A_+(?:libc_)?|_nocancel\Z", "", plain)}:
        for category, pattern in denied:
            if pattern.match(name):
                return category
    return None


def nm(archive, *options):
    """Yields (member, symbol)."""
    output = subprocess.run(
        ["nm", "--format=posix", "--no-sort", *options, archive], check=True, capture_output=True, text=True
    ).stdout
    member = ""
    for line in output.splitlines():
        if match := re.fullmatch(r"\S*\[(.+)\]:", line):
            member = match.group(1)
        elif line.strip():
            yield os.path.basename(member), line.split()[0]


def instructions(archive):
    """Yields (member, instruction) for each instruction that goes round the symbols."""
    output = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", archive], check=True, capture_output=True, text=True
    ).stdout
    member = ""
    for line in output.splitlines():
        if match := re.fullmatch(r"(\S+):\s+file format .*", line):
            member = os.path.basename(match.group(1))
        elif match := INSTRUCTIONS.search(line):
            yield member, re.sub(r"\s+", " ", match.group(1))


def source_of(member):
    """The name that meson gives to the object of base/alloc.c is base_alloc.c.o: what is before the last dot."""
    return re.sub(r"\.o\Z", "", member)


def read_allowed(path):
    """Lines `file symbol: reason`; returns {(file as source_of() gives it, symbol): line number}."""
    allowed = {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"(\S+)\s+(\S+)\s*:\s*(\S.*)", line.strip())
            if not match:
                sys.exit(f"{path}:{number}: expected `file symbol: reason`")
            allowed[match.group(1).replace("/", "_"), match.group(2)] = number
    return allowed


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="check rule S1 with nm")
    parser.add_argument("builddir")
    parser.add_argument("--allow", default=os.path.join(here, "symbols-allowed"))
    parser.add_argument("--layers", default=os.path.join(here, "layers"))
    args = parser.parse_args()

    sees = layers.read(args.layers)
    allowed = read_allowed(args.allow)
    denied = compile_denied()
    archives = {}
    for folder in sees:
        archive = os.path.join(args.builddir, "src", f"libcairn-{folder}.a")
        if os.path.exists(archive):
            archives[folder] = archive
    if not archives:
        sys.exit(f"{args.builddir}: no library of src/ is built there")

    home = {}
    for folder, archive in archives.items():
        for _, symbol in nm(archive, "--defined-only", "--extern-only"):
            home.setdefault(symbol, set()).add(folder)

    findings = []
    used = set()
    ruled = list(sees)[: list(sees).index(LAST) + 1] if LAST in sees else list(sees)
    checked = 0
    for folder, archive in archives.items():
        taken = set(nm(archive, "--undefined-only"))
        checked += len(taken)
        for member, symbol in sorted(taken):
            where = f"{folder}: {source_of(member)}"
            if symbol in home:
                if not home[symbol] & sees[folder]:
                    findings.append(f"{where} uses {symbol} of {sorted(home[symbol])[0]}, which it must not know")
                continue
            if folder not in ruled or folder in FREE:
                continue
            category = denied_category(symbol, denied)
            if not category:
                continue
            if (source_of(member), symbol) in allowed:
                used.add((source_of(member), symbol))
                continue
            findings.append(f"{where} calls {symbol} ({category}): only src/loop may (S1)")
        if folder in ruled and folder not in FREE:
            for member, instruction in sorted(set(instructions(archive))):
                findings.append(f"{folder}: {source_of(member)} has the instruction {instruction}: only src/loop may (S1)")
    for (source, symbol), number in allowed.items():
        if (source, symbol) not in used and source.split("_")[0] in archives:
            findings.append(f"{args.allow}:{number}: nothing needs {symbol} there any more: remove the line")
    for finding in findings:
        print(finding)
    print(f"symbols: {len(archives)} libraries, {checked} symbols from outside, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
