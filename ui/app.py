"""Navigation, and nothing else; started by `ui.serve`."""

import streamlit as st

st.set_page_config(page_title="tracer", layout="wide")
st.navigation(
    [
        st.Page("app_pages/runs.py", title="Runs", default=True),
        st.Page("app_pages/trace.py", title="Trace", url_path="trace"),
        st.Page("app_pages/tokens.py", title="Tokens", url_path="tokens"),
        st.Page("app_pages/graph.py", title="Graph", url_path="graph"),
        st.Page("app_pages/probes.py", title="Probes", url_path="probes"),
        st.Page("app_pages/compare.py", title="Compare", url_path="compare"),
        st.Page("app_pages/new_run.py", title="New run", url_path="new-run"),
        st.Page("app_pages/settings.py", title="Settings", url_path="settings"),
    ],
    position="top",
).run()
