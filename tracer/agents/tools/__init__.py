"""Tools for agents: LangChain tools, three bundled ones, and what runs any of them safely.

Importing this package does not import LangChain; building a tool does.
"""

from tracer.agents.tools.calculator import calculator
from tracer.agents.tools.documents import Corpus, load_documents, read_folder
from tracer.agents.tools.python import python_tool
from tracer.agents.tools.run import ToolResult, bundled, find_tool, run_tool, tool_specs
from tracer.agents.tools.search import search

__all__ = [
    "Corpus",
    "ToolResult",
    "bundled",
    "calculator",
    "find_tool",
    "load_documents",
    "python_tool",
    "read_folder",
    "run_tool",
    "search",
    "tool_specs",
]
