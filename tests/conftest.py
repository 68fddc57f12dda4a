"""Every pytest process has its share of the cores: torch would give each of them all."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that wait would take the other process's core
