"""Other libraries' models made fast; a library is imported where a call needs it, never before."""
