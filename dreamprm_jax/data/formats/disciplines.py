"""MMMU's six disciplines and their 30 subjects."""

DISCIPLINES = {
    "Art & Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health & Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities & Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech & Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
"""Of each discipline the subjects, in MMMU's own spelling."""

_BY_SUBJECT = {subject.lower(): name for name, subjects in DISCIPLINES.items() for subject in subjects}


def discipline(subject: str | None) -> str | None:
    """The discipline of a subject, None where it is none of MMMU's.

    >>> discipline("Clinical_Medicine"), discipline("Architecture & Engineering")
    ('Health & Medicine', 'Tech & Engineering')
    """
    words = (subject or "").replace("_", " ").replace("&", " and ").lower().split()
    return _BY_SUBJECT.get("_".join(words))
