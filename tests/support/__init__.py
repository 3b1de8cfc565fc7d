"""What tests in more than one directory use, and fixtures are made of: plain functions and classes, a module for each subject."""
