"""Opens pages in Chromium (PySide6's QtWebEngine) and does what it is told: run by test_selection_page.py.

``python browser.py STEPS.json`` prints JSON: what the page said on its console, and the result of every step. A step is
["load", file], ["js", expression], ["key", name, times], ["hover", x, y] or ["grab", file]. Exits with 77 where
Chromium cannot start.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")  # which containers do not allow
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", f"--disable-gpu {os.environ.get('TEST_BROWSER_FLAGS', '')}")

try:
    from PySide6.QtCore import QPoint, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import QWebEnginePage
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication
except ImportError as error:  # a library of the system is missing
    print(error)
    sys.exit(77)

SECONDS = 60
said: list[str] = []
results: list[Any] = []


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        said.append(f"{level.name}, line {line}: {message}")


def step() -> None:
    """Do the next step; every one but the last starts the one after it when it is done."""
    if not steps:
        app.quit()
        return
    kind, *arguments = steps.pop(0)
    target: Any = view.focusProxy()
    if kind == "load":
        view.load(QUrl.fromLocalFile(str(Path(arguments[0]).resolve())))  # goes on when it is loaded
        return
    if kind == "js":
        view.page().runJavaScript(f"JSON.stringify({arguments[0]})", done)
        return
    if kind == "key":
        for _ in range(arguments[1]):
            QTest.keyClick(target, getattr(Qt.Key, f"Key_{arguments[0]}"))
    elif kind == "hover":
        QTest.mouseMove(target, QPoint(*map(round, arguments)))
    elif kind == "grab":
        view.grab().save(arguments[0])
    QTimer.singleShot(300, lambda: done("true"))


def done(result: str) -> None:
    results.append(None if not result else json.loads(result))
    step()


steps = json.loads(Path(sys.argv[1]).read_text())
app = QApplication(["browser"])
view = QWebEngineView()
page = Page(view)
view.setPage(page)
view.resize(1200, 1100)
view.loadFinished.connect(lambda fine: QTimer.singleShot(200, lambda: done(json.dumps(fine))))
view.show()
QTimer.singleShot(1000 * SECONDS, lambda: app.exit(1))
QTimer.singleShot(0, step)
code = app.exec()
print(json.dumps({"console": said, "results": results}), flush=True)
os._exit(code)  # Chromium's own way out may hang
