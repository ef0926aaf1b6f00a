"""`up` with stand-ins for both servers: what it tells them, and that one which fails ends it. Pages, until Ctrl-C."""

from pipelines.retraining.services import find_log, find_marked
from tests.running import ROOT, call, free_port
from tests.terminal import CTRL_C, Terminal

NAMES = ("PREFECT_API_URL", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "MLFLOW_TRACKING_URI", "MLFLOW_SERVER_ALLOWED_HOSTS")
PREFECT = f"""
import os, sys, time
print(sys.argv[1:], *(os.environ[name] for name in {NAMES}), flush=True)
time.sleep(600)
"""
MLFLOW = """
import os, sys, time
while not os.path.getsize("scratch/services/prefect.log"):
    time.sleep(0.01)
sys.exit(f"{sys.argv[1:]}: unable to open database file")
"""


def test_at_another_address_a_failing_mlflow_is_one_line_and_leaves_nothing_running(tmp_path):
    """With the servers themselves, and what can then be called: tests/slow/test_up_and_down.py."""
    for name, code in (("prefect", PREFECT), ("mlflow", MLFLOW)):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    host, prefect, mlflow = "127.0.0.2", free_port(), free_port()
    asked = ("--host", host, "--prefect-port", str(prefect), "--mlflow-port", str(mlflow))
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MLFLOW_BACKEND_STORE_URI": "sqlite:////nowhere/mlflow.db"}
    said = call(tmp_path, "python", "-m", "pipelines", "up", *asked, code=1, cold=True, **env)
    command = ["server", "--host", host, "--port", str(mlflow), "--workers", "1"]
    assert said == (
        f"error: http://{host}:{mlflow}/health does not answer; the end of {find_log(tmp_path, 'mlflow')}: "
        f"{command}: unable to open database file\n"
    )
    assert find_marked(tmp_path) == []
    told = (f"http://{host}:{prefect}/api", f"http://{host}:{prefect}", f"http://{host}:{mlflow}", f"{host}:{mlflow}")
    command = ["server", "start", "--host", host, "--port", str(prefect)]
    assert find_log(tmp_path, "prefect").read_text(encoding="utf-8") == " ".join([str(command), *told]) + "\n"


def test_pages_are_served_until_ctrl_c_even_as_the_server_begins(tmp_path):
    (tmp_path / "scratch/data_docs").mkdir(parents=True)
    asked = ("python", "-m", "pipelines", "ui", "docs", "--port", str(free_port()))
    terminal = Terminal(tmp_path, *asked, cold=True, PYTHONPATH=str(ROOT))
    terminal.wait_for("Ctrl-C ends it")
    terminal.press(CTRL_C)
    code, lines = terminal.end()
    assert (code, lines[-1]) == (130, "stopped")
    assert "Traceback" not in terminal.said
