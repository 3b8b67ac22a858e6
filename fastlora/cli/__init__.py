"""The commands of ``python -m fastlora``; nothing in the library imports this package."""
