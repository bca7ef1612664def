"""Components of our own on ``st.components.v2``: a Python file says what is sent, JavaScript and CSS lie beside it.

What they share:

- `mount.component` reads ``NAME.js`` and ``NAME.css`` behind ``common.js`` and ``common.css``; nothing is built, and
  nothing is loaded from elsewhere.
- Text of a trace only ever becomes ``textContent``; a test forbids everything that would read it as HTML.
- What is sent carries a ``rev``, so that a component that is called with what it shows already does nothing.
- The selection is not part of what is sent: a component marks what was clicked by itself and tells Python, which puts
  it in the URL. Where it was chosen elsewhere, `mount.tell` hands it over.
"""
