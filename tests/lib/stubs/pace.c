// LD_PRELOAD: the kernel sends no more than $PACE bytes a second through any TCP connection of this process.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>

int socket(int domain, int type, int protocol) {
  int (*real)(int, int, int) = dlsym(RTLD_NEXT, "socket");
  const int made = real(domain, type, protocol);
  const unsigned pace = atoi(getenv("PACE"));
  setsockopt(made, SOL_SOCKET, SO_MAX_PACING_RATE, &pace, sizeof pace);
  return made;
}
