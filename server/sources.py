"""Names of the writers of tokens: the student, or a teacher."""

Source = str
STUDENT = "student"
TEACHER = "teacher"
"""Name of an only teacher to which the operator gave no name."""
