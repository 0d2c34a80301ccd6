/* Holds a pod's namespaces: sleeps until told to end, and reaps orphans, because with a
 * shared PID namespace it is their init. With any argument it ends at once, which lets
 * the harness ask whether an engine can start a container at all. */
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void finish(int sig) {
    (void)sig;
    _exit(0);
}

static void reap(int sig) {
    (void)sig;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}

int main(int argc, char **argv) {
    struct sigaction end = {.sa_handler = finish};
    struct sigaction child = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    (void)argv;
    if (argc > 1) {
        return 0;
    }
    if (sigaction(SIGINT, &end, NULL) || sigaction(SIGTERM, &end, NULL) ||
        sigaction(SIGCHLD, &child, NULL)) {
        return 1;
    }
    for (;;) {
        pause();
    }
}
