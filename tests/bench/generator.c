/* SPDX-License-Identifier: MIT */
/*
 * generator CALLS_PER_SECOND SECONDS: waits for a byte on stdin, then makes getppid() calls evenly.
 * Prints how many, how long it took, and CLOCK_MONOTONIC at the end, in seconds.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
	double rate = argc > 1 ? atof(argv[1]) : 1, seconds = argc > 2 ? atof(argv[2]) : 1;
	unsigned long done = 0;
	double start, t;
	char go;

	if (read(0, &go, 1) != 1)
		return 1;
	start = now();
	while ((t = now() - start) < seconds) {
		unsigned long due = t * rate;

		for (; done < due; done++)
			syscall(SYS_getppid);
	}
	printf("%lu %.6f %.6f\n", done, t, start + t);
	return 0;
}
