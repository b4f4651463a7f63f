"""Names of the writers of tokens: the student, or a teacher."""

Source = str
STUDENT = "student"
TEACHER = "teacher"
"""The name of the only teacher, if nobody gave it one."""
