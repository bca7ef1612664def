"""Navigation, and nothing else; started by `ui.serve`."""

from pathlib import Path

import streamlit as st

PAGES = [
    st.Page("app_pages/runs.py", title="Runs", default=True),
    st.Page("app_pages/trace.py", title="Trace", url_path="trace"),
]
FOLDER = Path(__file__).with_name("app_pages")
if (FOLDER / "tokens.py").exists():
    PAGES.append(st.Page("app_pages/tokens.py", title="Tokens", url_path="tokens"))
if (FOLDER / "graph.py").exists():
    PAGES.append(st.Page("app_pages/graph.py", title="Graph", url_path="graph"))
if (FOLDER / "probes.py").exists():
    PAGES.append(st.Page("app_pages/probes.py", title="Probes", url_path="probes"))
if (FOLDER / "compare.py").exists():
    PAGES.append(st.Page("app_pages/compare.py", title="Compare", url_path="compare"))
PAGES += [
    st.Page("app_pages/new_run.py", title="New run", url_path="new-run"),
    st.Page("app_pages/settings.py", title="Settings", url_path="settings"),
]

st.set_page_config(page_title="tracer", layout="wide")
st.navigation(PAGES, position="top").run()
