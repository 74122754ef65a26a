// stepclock FILE PROGRAM ARGUMENT...: runs a program whose wall clock differs from
// the machine's by the number of seconds in FILE. The file is read at each look
// at the clock, so that a test can step the clock of a running program; the
// monotonic clock stays true, as when an operator sets the time.
//
// How: a program asks the vDSO, which needs no system call. It is taken out of
// the auxiliary vector at exec, so that the program makes the call; a seccomp
// filter stops at just those calls, and their answers are changed on the way out.
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *file;

static void die(const char *what) {
	perror(what);
	exit(125);
}

static long offset(void) {
	char text[32] = "";
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	return n > 0 ? atol(text) : 0;
}

// The child: stop at clock_gettime, gettimeofday and time; then be the program.
static void run(char **argv) {
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_gettimeofday, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_time, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	if (ptrace(PTRACE_TRACEME, 0, 0, 0) != 0)
		die("ptrace");
	raise(SIGSTOP); // until the parent has set its options
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		die("seccomp");
	execvp(argv[0], argv);
	die(argv[0]);
}

// Takes the vDSO out of the auxiliary vector, which stands on the stack after
// argc, the arguments, the environment, and a null after each of the two.
static void hide_vdso(pid_t pid) {
	struct user_regs_struct regs;
	if (ptrace(PTRACE_GETREGS, pid, 0, &regs) != 0)
		return;
	unsigned long at = regs.rsp;
	errno = 0;
	long argc = ptrace(PTRACE_PEEKDATA, pid, at, 0);
	at += (argc + 2) * sizeof(long);
	while (ptrace(PTRACE_PEEKDATA, pid, at, 0) != 0)
		at += sizeof(long);
	for (at += sizeof(long); errno == 0; at += 2 * sizeof(long)) {
		long type = ptrace(PTRACE_PEEKDATA, pid, at, 0);
		if (type == AT_NULL)
			return;
		if (type == AT_SYSINFO_EHDR)
			ptrace(PTRACE_POKEDATA, pid, at, AT_IGNORE);
	}
}

static void change_answer(pid_t pid) {
	struct user_regs_struct regs;
	if (ptrace(PTRACE_GETREGS, pid, 0, &regs) != 0 || (long)regs.rax < 0)
		return;
	unsigned long at = 0; // of the seconds
	switch (regs.orig_rax) {
	case SYS_clock_gettime:
		if (regs.rdi == CLOCK_REALTIME || regs.rdi == CLOCK_REALTIME_COARSE || regs.rdi == CLOCK_TAI)
			at = regs.rsi;
		break;
	case SYS_gettimeofday:
		at = regs.rdi;
		break;
	case SYS_time:
		at = regs.rdi;
		regs.rax += offset();
		ptrace(PTRACE_SETREGS, pid, 0, &regs);
		break;
	}
	if (at == 0)
		return;
	errno = 0;
	long seconds = ptrace(PTRACE_PEEKDATA, pid, at, 0);
	if (errno == 0)
		ptrace(PTRACE_POKEDATA, pid, at, seconds + offset());
}

static pid_t child;

static void pass_on(int sig) { kill(child, sig); }

int main(int argc, char **argv) {
	if (argc < 3) {
		fprintf(stderr, "usage: stepclock FILE PROGRAM ARGUMENT...\n");
		return 125;
	}
	file = argv[1];
	if ((child = fork()) == 0)
		run(argv + 2);
	int status;
	if (child < 0 || waitpid(child, &status, 0) != child)
		die("fork");
	long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEEXEC | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK |
		PTRACE_O_TRACEVFORK | PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL;
	if (ptrace(PTRACE_SETOPTIONS, child, 0, options) != 0)
		die("ptrace");
	signal(SIGTERM, pass_on);
	signal(SIGINT, pass_on);
	ptrace(PTRACE_CONT, child, 0, 0);
	for (;;) {
		pid_t pid = waitpid(-1, &status, __WALL);
		if (pid < 0 && errno == EINTR)
			continue;
		if (pid < 0)
			return 125;
		if (pid == child && WIFEXITED(status))
			return WEXITSTATUS(status);
		if (pid == child && WIFSIGNALED(status)) {
			signal(WTERMSIG(status), SIG_DFL);
			raise(WTERMSIG(status));
		}
		if (!WIFSTOPPED(status))
			continue;
		int sig = WSTOPSIG(status), event = status >> 16, deliver = 0, request = PTRACE_CONT;
		if (event == PTRACE_EVENT_SECCOMP)
			request = PTRACE_SYSCALL; // to the answer
		else if (event == PTRACE_EVENT_EXEC)
			hide_vdso(pid);
		else if (sig == (SIGTRAP | 0x80))
			change_answer(pid);
		else if (event == 0 && sig != SIGSTOP && sig != SIGTRAP)
			deliver = sig;
		ptrace(request, pid, 0, deliver);
	}
}
