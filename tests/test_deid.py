"""deid.py: identifiers planted by Faker and how many are found, what must not be taken for one, and the properties."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import itertools
import re
import string
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from conftest import load_asset
from faker import Faker
from hypothesis import given, settings
from hypothesis import strategies as st

from radllama import deid
from radllama.deid import HIPAA, KINDS, Identifier, redact, replace, screen, screen_with_presidio

ROOT = Path(__file__).resolve().parents[1]


make_reports = load_asset("make_reports")

# ---- the planted identifiers
#
# FROZEN before the first rule of deid.py was written, and not to be changed to suit a rule: a format that the rules
# miss stays in, and its miss stays in the figures. Values come from Faker or are plain random digits, wordings are
# literal sentences; there is no regular expression here and nothing is taken from deid.py.
#
# In every group each fourth wording is held back: the rules were tuned on the others with SEED, and tried on these,
# with HELD_BACK_SEED, when they were done.

SEED, HELD_BACK_SEED = 20_240_811, 77_003
NAME_LOCALES = (
    "en_US",
    "en_US",
    "en_US",
    "en_GB",
    "es_MX",
    "en_IN",
    "it_IT",
    "de_DE",
    "pl_PL",
    "fr_FR",
    "vi_VN",
    "en_NG",
)
CITIES = (
    "Boston", "Worcester", "Springfield", "Providence", "Hartford", "Albany", "Cleveland", "Durham", "Atlanta",
    "Houston",
    "Phoenix", "San Diego", "Salt Lake City", "St. Louis", "Baltimore", "New Bedford", "Portland", "Ann Arbor",
)  # fmt: skip
STATES = ("MA", "NY", "CA", "TX", "OH", "PA", "NC", "FL", "WA", "MN", "Massachusetts", "New Hampshire", "Ohio", "Texas")
SMALL = ("ninety", "ninety-one", "ninety-two", "ninety-three", "ninety-five", "ninety-seven", "ninety-nine")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


class Maker:
    """Values of each kind, from Faker and plain random digits: `make("phone.pager")` calls `phone_pager`."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.us = Faker("en_US")
        self.people = [Faker(locale) for locale in NAME_LOCALES]
        for i, source in enumerate([self.us, *self.people]):
            source.seed_instance(seed + i)

    def make(self, field: str) -> str:
        return str(getattr(self, field.replace(".", "_"))())

    def digits(self, *lengths: int) -> str:
        """As many digits as one of the lengths says."""
        return "".join(self.rng.choice("0123456789") for _ in range(self.rng.choice(lengths)))

    def letters(self, count: int) -> str:
        return "".join(self.rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(count))

    def name_last(self) -> str:
        return self.rng.choice(self.people).last_name()

    def name_first(self) -> str:
        return self.rng.choice(self.people).first_name()

    def name_full(self) -> str:
        person = self.rng.choice(self.people)
        first, last, initial = person.first_name(), person.last_name(), self.letters(1)
        return self.rng.choice(
            [f"{first} {last}", f"{first} {last}", f"{first} {initial}. {last}", f"{initial}. {last}"]
        )

    def name_listed(self) -> str:
        person = self.rng.choice(self.people)
        first, last, initial = person.first_name(), person.last_name(), self.letters(1)
        return self.rng.choice(
            [
                f"{last}, {first}",
                f"{last}, {first} {initial}",
                f"{last.upper()}, {first.upper()}",
                f"{last}, {first} {initial}.",
            ]
        )

    def name_any(self) -> str:
        return self.name_listed() if self.rng.random() < 0.5 else self.name_full()

    def day(self) -> datetime.date:
        return datetime.date(1932, 1, 1) + datetime.timedelta(days=self.rng.randrange(34_000))

    def date_full(self) -> str:
        d = self.day()
        month, short, year = MONTHS[d.month - 1], MONTHS[d.month - 1][:3], d.year % 100
        nth = "th" if d.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(d.day % 10, "th")
        return self.rng.choice(
            [
                f"{d.month:02}/{d.day:02}/{d.year}", f"{d.month}/{d.day}/{d.year}", f"{d.month}/{d.day}/{year:02}",
                f"{d.month:02}/{d.day:02}/{year:02}", f"{d.month:02}-{d.day:02}-{d.year}",
                f"{d.month}-{d.day}-{year:02}",
                f"{d.day:02}.{d.month:02}.{d.year}", f"{d.day}.{d.month}.{year:02}",
                f"{d.year}-{d.month:02}-{d.day:02}",
                f"{d.year}/{d.month:02}/{d.day:02}", f"{d.year}{d.month:02}{d.day:02}",
                f"{d.day:02}/{d.month:02}/{d.year}",
                f"{d.year}-{d.month:02}-{d.day:02}T{self.rng.randrange(24):02}:{self.rng.randrange(60):02}:07",
                f"{month} {d.day}, {d.year}", f"{short} {d.day}, {d.year}", f"{short}. {d.day}, {d.year}",
                f"{short} {d.day} {d.year}", f"{month} {d.day}{nth}, {d.year}", f"{d.day} {month} {d.year}",
                f"{d.day} {short} {d.year}", f"{d.day:02}-{short}-{d.year}", f"{d.day:02}-{short.upper()}-{year:02}",
                f"{d.day:02}{short.upper()}{d.year}", f"{short}-{d.day:02}-{d.year}",
                f"{month.upper()} {d.day}, {d.year}",
                f"the {d.day}{nth} of {month} {d.year}", f"{d:%A}, {month} {d.day}, {d.year}",
                f"{month} {d.day} {d.year}",
            ]
        )  # fmt: skip

    def date_month(self) -> str:
        d = self.day()
        month = MONTHS[d.month - 1]
        return self.rng.choice(
            [f"{month} {d.year}", f"{month[:3]} {d.year}", f"{month} of {d.year}", f"{d.month:02}/{d.year}"]
        )

    def date_day(self) -> str:
        d = self.day()
        month = MONTHS[d.month - 1]
        nth = "th" if d.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(d.day % 10, "th")
        return self.rng.choice(
            [
                f"{d.month}/{d.day}",
                f"{d.month:02}/{d.day:02}",
                f"{month} {d.day}",
                f"{month} {d.day}{nth}",
                f"{month[:3]} {d.day}",
            ]
        )

    def age_over_89(self) -> str:
        return str(self.rng.choice([*range(90, 103), 105, 108]))

    def age_over_89_words(self) -> str:
        return self.rng.choice(SMALL)

    def phone_full(self) -> str:
        return self.us.phone_number() if self.rng.random() < 0.6 else self.us.basic_phone_number()

    def phone_written(self) -> str:
        """With separators, as it stands out without a label."""
        a, b, c = str(self.rng.randrange(201, 990)), str(self.rng.randrange(200, 999)), self.digits(4)
        return self.rng.choice(
            [f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"{a}.{b}.{c}", f"{a} {b} {c}", f"+1 {a} {b} {c}", f"1-{a}-{b}-{c}"]
        )

    def phone_local(self) -> str:
        return self.rng.choice(
            [f"{self.rng.randrange(200, 999)}-{self.digits(4)}", self.digits(5), f"{self.digits(1)}-{self.digits(4)}"]
        )

    def fax(self) -> str:
        return self.phone_full()

    def email(self) -> str:
        return self.rng.choice([self.us.email, self.us.company_email, self.us.safe_email])()

    def url(self) -> str:
        word, host = self.us.user_name(), self.us.domain_name()
        plain = [self.us.url(), self.us.uri(), f"https://{host}/view?study={self.digits(6)}"]
        return self.rng.choice([*plain, f"www.{host}", f"www.{host}/{word}", f"portal.{host}/patients/{word}"])

    def ip(self) -> str:
        return self.rng.choice([self.us.ipv4, self.us.ipv4, self.us.ipv4_private, self.us.ipv6])()

    def ssn(self) -> str:
        value = self.us.ssn()
        return self.rng.choice([value, value, value.replace("-", " "), value.replace("-", "")])

    def mrn(self) -> str:
        d = self.digits
        return self.rng.choice(
            [d(6, 7, 8), d(6, 7, 8, 9, 10), f"{d(3)}-{d(2)}-{d(2)}", f"{d(2)}-{d(2)}-{d(2)}",
             f"{self.letters(1)}{d(6, 8)}",
             f"00{d(5)}", f"{d(3)}-{d(4)}", f"{self.letters(2)}{d(7)}", f"{d(3)} {d(3)} {d(3)}"]
        )  # fmt: skip

    def accession(self) -> str:
        d, year = self.digits, self.rng.randrange(2005, 2025)
        return self.rng.choice(
            [d(7, 8), f"{self.letters(1)}{d(7, 8)}", f"{self.letters(2)}-{year % 100:02}-{d(6)}",
             f"{year}{self.letters(2)}{d(6)}",
             f"{d(7)}-{d(1)}", f"{self.letters(3)}{d(9)}", f"{year % 100:02}-{self.letters(2)}-{d(5)}",
             f"{d(2)}-{d(6)}"]
        )  # fmt: skip

    def zip(self) -> str:
        return self.us.postcode() if self.rng.random() < 0.7 else self.us.zipcode_plus4()

    def health_plan(self) -> str:
        d = self.digits
        return self.rng.choice(
            [
                f"{self.letters(3)}{d(9)}",
                d(9, 10, 11),
                f"{d(9)}-{d(2)}",
                f"{d(1)}{self.letters(2)}{d(1)}-{self.letters(2)}{d(1)}-{self.letters(2)}{d(2)}",
            ]
        )

    def account(self) -> str:
        return self.rng.choice(
            [self.digits(8, 9, 10, 12), f"{self.letters(1)}{self.digits(9)}", f"{self.digits(4)}-{self.digits(5)}"]
        )

    def account_bank(self) -> str:
        return self.us.iban()

    def account_card(self) -> str:
        value = self.us.credit_card_number(card_type="visa16")
        return self.rng.choice(
            [
                value,
                " ".join(value[i : i + 4] for i in range(0, 16, 4)),
                "-".join(value[i : i + 4] for i in range(0, 16, 4)),
            ]
        )

    def license(self) -> str:
        return self.rng.choice(
            [
                f"{self.letters(1)}{self.digits(7, 8)}",
                self.digits(6, 9),
                f"{self.letters(2)}{self.digits(6)}",
                f"{self.letters(1)}{self.digits(3)}-{self.digits(4)}",
            ]
        )

    def license_npi(self) -> str:
        return f"1{self.digits(9)}"

    def license_dea(self) -> str:
        return f"{self.letters(2)}{self.digits(7)}"

    def vehicle_plate(self) -> str:
        return self.us.license_plate()

    def vehicle_vin(self) -> str:
        return self.us.vin()

    def device(self) -> str:
        d = self.digits
        return self.rng.choice(
            [
                f"{self.letters(3)}{d(6)}{self.letters(1)}",
                f"SN{d(6, 8)}",
                d(7, 9),
                f"{d(2)}-{self.letters(1)}{d(5)}",
                f"{self.letters(2)}-{d(6)}",
            ]
        )

    def device_udi(self) -> str:
        expiry = f"{self.rng.randrange(24, 32)}0{self.rng.randrange(1, 9)}00"
        return f"(01)0{self.digits(13)}(17){expiry}(21){self.letters(1)}{self.digits(6)}"

    def device_mac(self) -> str:
        return self.us.mac_address()

    def biometric(self) -> str:
        return self.rng.choice(
            [f"{self.letters(2)}-{self.digits(6)}", self.digits(8), f"{self.letters(1)}{self.digits(7)}"]
        )

    def photo(self) -> str:
        stem = self.rng.choice(["IMG_", "DSC", "face_", "photo-", "patient_"])
        return f"{stem}{self.digits(4)}.{self.rng.choice(['jpg', 'JPG', 'png', 'jpeg', 'heic'])}"

    def other_id(self) -> str:
        return self.rng.choice(
            [
                f"{self.letters(3)}-{self.digits(3)}-{self.digits(3)}",
                self.digits(5, 6),
                f"{self.letters(2)}{self.digits(5)}",
                f"{self.digits(3)}-{self.digits(4)}",
            ]
        )

    def other_id_uid(self) -> str:
        root = f"1.2.840.{self.digits(6).lstrip('0')}1"
        return f"{root}.{self.rng.randrange(1, 99)}.{self.rng.randrange(1, 999)}.1{self.digits(9, 12)}"

    def other_id_uuid(self) -> str:
        return self.us.uuid4()

    def geographic_street(self) -> str:
        plain = self.us.street_address()
        return self.rng.choice([plain, plain, f"PO Box {self.rng.randrange(10, 9999)}", plain.upper()])

    def geographic_city(self) -> str:
        return self.rng.choice(CITIES) if self.rng.random() < 0.6 else self.us.city()

    def geographic_county(self) -> str:
        return f"{self.us.last_name()} County"

    def geographic_hospital(self) -> str:
        city, last = self.rng.choice(CITIES), self.us.last_name()
        return self.rng.choice(
            [f"{city} General Hospital", f"{last} Memorial Hospital", f"{city} Medical Center",
             f"Mount {last} Hospital",
             f"St. {self.us.first_name()}'s Hospital", f"{city} Community Hospital", f"{last} Clinic",
             f"{last} Nursing Home"]
        )  # fmt: skip

    # What a wording needs around its identifiers, and is none.
    def around_state(self) -> str:
        return self.rng.choice(STATES)

    def around_time(self) -> str:
        h, m = self.rng.randrange(1, 13), self.rng.randrange(60)
        return self.rng.choice([f"{h}:{m:02} PM", f"{h}:{m:02} am", f"{h + 9:02}:{m:02}", f"{h + 9:02}{m:02} hours"])


# A wording that starts with "|" is a line of its own; any other is a sentence set between two of the report.
WORDINGS: dict[str, tuple[str, ...]] = {
    "name": (
        "|Patient: {name.any}", "|Patient Name: {name.any}", "|Name: {name.listed}", "|PATIENT NAME: {name.listed}",
        "|Referring physician: {name.full}, MD", "|Ordering provider: {name.listed}", "|Attending: Dr. {name.full}",
        "|Radiologist: {name.full}", "|Dictated by: {name.full}, M.D.", "|Electronically signed by: {name.full}, MD",
        "|Electronically signed by {name.any} on {date.full} {around.time}", "|Read by {name.full}",
        "|cc: {name.full}, MD", "|Resident: {name.full}, M.D.", "|Technologist: {name.full} RT(R)",
        "|Transcribed by: {name.full}", "|Interpreting Radiologist: {name.full} M.D.",
        "|Attending Radiologist: {name.full}", "|Signed: {name.full}, DO", "|Interpreted by: {name.full}",
        "|Reviewed and approved by: {name.full}, MD, PhD", "|Ordered By: {name.listed}", "|To: Dr. {name.last}",
        "|Requested by {name.full}, NP", "|Final report by {name.full}, M.D.", "|PCP: {name.full}",
        "Findings were discussed with Dr. {name.last} at {around.time}.", "Discussed with {name.full}, RN.",
        "Results were communicated to {name.full} by telephone at {around.time}.", "Dr. {name.full} was notified.",
        "Mr. {name.last} was scanned in the supine position.", "Mrs. {name.last} could not hold still.",
        "Ms. {name.last}'s prior studies were not available.", "These results were called to Dr. {name.last}.",
        "I, {name.full}, have personally reviewed the images and agree with this report.",
        "The above was reviewed with {name.full}, MD.", "Findings reported to nurse {name.full} at {around.time}.",
        "Critical result relayed to {name.last}, PA-C.",
        "Procedure performed by {name.full}, MD and {name.full}, MD.",
        "{name.full} is a 54-year-old man with chest pain.", "Per Dr. {name.last}, follow-up is planned.",
        "Consent was obtained from the patient's daughter, {name.full}.",
        "Discussed with Drs. {name.last} and {name.last}.", "Dr {name.last} of surgery was paged.",
        "Professor {name.last} concurs.", "dr. {name.last} was informed.",
        "The patient's wife {name.first} was present.", "Spoke with {name.full} from the ED.",
        "{name.full}, MD, was present.", "As discussed with {name.last} this morning, no biopsy was done.",
        "Miss {name.first} {name.last} tolerated this well.",
        "The study was reviewed by the attending, {name.full}.", "Comparison was made together with {name.full}.",
        "The images were shown to {name.full} in person.",
        "Patient {name.full} was examined in the left decubitus position.",
    ),
    "geographic": (
        "|Address: {geographic.street}",
        "|Patient address: {geographic.street}, {geographic.city}, {around.state} {zip}",
        "|Location: {geographic.hospital}",
        "|Performed at: {geographic.hospital}, {geographic.city}, {around.state}",
        "|Facility: {geographic.hospital}", "|City: {geographic.city}", "|County: {geographic.county}",
        "|Site: {geographic.hospital}", "Outside films from {geographic.hospital} were reviewed.",
        "The patient was transferred from {geographic.hospital}.",
        "The patient lives in {geographic.city}, {around.state}.", "Resident of {geographic.county}.",
        "The patient resides at {geographic.street}.", "CT was done at {geographic.hospital}.",
        "The patient comes from {geographic.city}.", "Compared with the study from {geographic.hospital} in 2016.",
        "Please mail films to {geographic.street}, {geographic.city}.",
        "Motor vehicle collision near {geographic.city}.",
    ),
    "zip": (
        "|Address: {geographic.street}, {geographic.city}, {around.state} {zip}", "|ZIP: {zip}", "|Zip code: {zip}",
        "|{geographic.city}, {around.state} {zip}", "The patient lives in {geographic.city}, {around.state} {zip}.",
        "|Postal code: {zip}", "|State/ZIP: {around.state} {zip}", "Home zip code is {zip}.",
        "Mail to {geographic.street}, {geographic.city} {around.state} {zip}.", "|Patient ZIP Code {zip}",
    ),
    "date": (
        "|Date: {date.full}", "|DOB: {date.full}", "|Date of birth: {date.full}",
        "|Date of exam: {date.full} {around.time}", "|Exam date: {date.full}",
        "|COMPARISON: Chest radiograph of {date.full}.", "|Comparison: {date.full}",
        "|Comparison: CT dated {date.full} and {date.full}.", "|Admitted: {date.full}",
        "|Signed {date.full} {around.time}", "|Report date: {date.full}", "|Dictated: {date.full} at {around.time}",
        "|Comparison: {date.month}.", "|Date of Service: {date.full}", "|Birthdate {date.full}",
        "|D: {date.full} T: {date.full}", "|Comparison: MRI {date.full}",
        "Compared with the prior study of {date.full}, there is no change.", "Unchanged since {date.full}.",
        "The nodule was first seen on {date.full}.", "Status post resection on {date.full}.",
        "Surgery in {date.month}.", "Compared to {date.day}, the effusion is smaller.",
        "The drain was placed on {date.day}.", "Last menstrual period {date.full}.",
        "Prior examination from {date.full} is available.", "There has been growth from {date.full} to {date.full}.",
        "Biopsy was performed in {date.month} with benign result.", "Radiation therapy ended {date.month}.",
        "Since the exam of {date.day} the tube has been removed.", "Seen on the study from {date.day}.",
        "The patient died on {date.full}.", "Follow-up is scheduled for {date.full}.",
        "Prior CT chest {date.full} showed the same nodule.", "Admitted {date.full}.",
        "Discharged {date.full}, now with recurrent pain.", "Images of {date.full} were reviewed.",
        "Stable since {date.month}.",
    ),
    "age_over_89": (
        "{age_over_89}-year-old woman with cough.", "{age_over_89} year old male with a fall.",
        "{age_over_89} y/o F with dyspnea.", "{age_over_89} yo man with hip pain.",
        "Patient is {age_over_89} years old.", "|Age: {age_over_89}", "|Age: {age_over_89} years",
        "A {age_over_89} y.o. woman presents with fever.", "|Patient age: {age_over_89}Y",
        "Woman aged {age_over_89} with weakness.", "The patient, age {age_over_89}, fell at home.",
        "{age_over_89}F with confusion.", "{age_over_89}M status post fall.",
        "{age_over_89.words}-year-old woman with pneumonia.", "{age_over_89}-yr-old with sepsis.",
        "He is {age_over_89} years of age.", "Fall in a {age_over_89}-year-old.", "|Sex/Age: F/{age_over_89}",
        "{age_over_89.words} year old man with syncope.", "{age_over_89} yrs old female, short of breath.",
    ),
    "phone": (
        "|Phone: {phone.full}", "|Tel: {phone.full}", "|Telephone {phone.full}", "|Home phone: {phone.full}",
        "|Contact: {phone.written}", "|Cell: {phone.full}",
        "Results were called to {phone.written} at {around.time}.",
        "Dr. {name.last} was reached at {phone.written}.", "Please call {phone.full} with questions.",
        "The team was paged at {phone.written}.", "Pager {phone.local}.", "|Pager: {phone.local}",
        "Call the reading room at {phone.local}.", "The family can be reached at {phone.full}.",
        "Questions? Call {phone.written}.", "For questions call extension {phone.local}.",
        "Communicated by phone ({phone.written}).", "|Ph. {phone.full}",
        "Reading room phone number is {phone.full}.", "|Emergency contact: {name.full} {phone.written}",
    ),
    "fax": (
        "|Fax: {fax}", "|FAX {fax}", "|Fax number: {fax}", "The report was faxed to {fax}.", "Please fax to {fax}.",
        "|Tel: {phone.full} Fax: {fax}", "|Fax #: {fax}", "The results were sent by fax to {fax}.",
    ),
    "email": (
        "|Email: {email}", "|E-mail {email}", "Contact {email} for questions.", "The report was sent to {email}.",
        "Please write to {email}.", "|Referrer: {email}", "Results were e-mailed ({email}).", "|{email}",
    ),
    "url": (
        "Images are available at {url}.", "|Portal: {url}", "See {url} for follow-up guidance.", "|{url}",
        "|Link: {url}", "The report can be viewed on {url}.", "Images ({url}) were reviewed.", "|View images: {url}",
    ),
    "ip": (
        "|IP: {ip}", "Images were sent to node {ip}.", "|Station IP address {ip}",
        "Retrieved from {ip} without error.", "|PACS node: {ip}", "|Workstation: {ip}", "Read remotely from {ip}.",
        "|Host {ip}",
    ),
    "ssn": (
        "|SSN: {ssn}", "|Social Security Number: {ssn}", "|Social security no. {ssn}", "|SS#: {ssn}",
        "|Patient SSN {ssn}", "The social security number on file is {ssn}.", "|SSN# {ssn}", "|Soc Sec No: {ssn}",
    ),
    "mrn": (
        "|MRN: {mrn}", "|MRN {mrn}", "|MRN#: {mrn}", "|Medical Record Number: {mrn}", "|Medical record #: {mrn}",
        "|MR#: {mrn}", "|MR No. {mrn}", "|Patient: {name.listed} (MRN {mrn})", "|Patient ID: {mrn}",
        "|Unit No: {mrn}", "|Med Rec No: {mrn}", "The patient (MRN {mrn}) was identified by wristband.",
        "|Hospital number: {mrn}", "|MRN/{mrn}", "|Med. Rec. #{mrn}", "|Patient MRN: {mrn} DOB: {date.full}",
        "Images were filed under MRN {mrn} in error.", "|Pt. ID {mrn}", "|Chart #: {mrn}",
        "|Medical Record No.: {mrn}",
    ),
    "accession": (
        "|Accession: {accession}", "|Accession Number: {accession}", "|ACC#: {accession}",
        "|Accession #: {accession}", "|Acc No. {accession}", "|Accession No: {accession}",
        "Compared with accession number {accession}.", "|ACCESSION {accession}", "|Acc: {accession}",
        "|Order number: {accession}", "|Exam number: {accession}", "See accession {accession} for details.",
        "|Order #: {accession}", "|Accn: {accession}", "|MRN: {mrn} ACC: {accession}",
        "|Study accession no. {accession}",
    ),
    "health_plan": (
        "|Member ID: {health_plan}", "|Insurance ID: {health_plan}", "|Medicare number: {health_plan}",
        "|Policy #: {health_plan}", "|Subscriber ID: {health_plan}", "|Health plan beneficiary number {health_plan}",
        "|Medicaid ID: {health_plan}", "|Insurance policy no. {health_plan}", "|Group number: {health_plan}",
        "|Medicare HIC: {health_plan}",
    ),
    "account": (
        "|Account number: {account}", "|Acct #: {account}", "|FIN: {account}", "|Account No. {account}",
        "|CSN: {account}", "|Encounter: {account}", "|Visit #: {account}", "|Billing account {account}",
        "|IBAN: {account.bank}", "|Encounter number {account}", "Paid by card {account.card}.", "|Acct: {account}",
        "|Credit card: {account.card}",
    ),
    "license": (
        "|NPI: {license.npi}", "|License: {license}", "|License No. {license}", "|DEA: {license.dea}",
        "|DEA # {license.dea}", "|Driver's license: {license}", "|State license number: {license}",
        "|Medical license #{license}", "|NPI {license.npi}", "The driver's license number is {license}.",
    ),
    "vehicle": (
        "|VIN: {vehicle.vin}", "|License plate: {vehicle.plate}", "Vehicle identification number {vehicle.vin}.",
        "The driver's car, license plate {vehicle.plate}, was struck from behind.", "|Plate number: {vehicle.plate}",
        "|Vehicle: {vehicle.vin}", "The car (VIN {vehicle.vin}) rolled over.", "|Vehicle plate {vehicle.plate}",
    ),
    "device": (
        "|Serial number: {device}", "|S/N: {device}", "The pacemaker has serial number {device}.",
        "|Device serial no. {device}", "|UDI: {device.udi}", "|Device ID: {device}",
        "Hip prosthesis, serial # {device}.", "|Lot number: {device}", "Pump serial no. {device} was interrogated.",
        "|MAC address: {device.mac}", "|Scanner S/N {device}", "|Implant ID: {device}",
        "|Device identifier: {device.udi}",
    ),
    "biometric": (
        "|Fingerprint ID: {biometric}", "|Iris scan ID: {biometric}", "Voiceprint {biometric} was matched.",
        "|Retinal scan ID {biometric}", "Fingerprint no. {biometric} is on file.", "|Biometric ID: {biometric}",
        "|Voice print ID: {biometric}", "|Palm print: {biometric}",
    ),
    "photo": (
        "|Photo: {photo}", "A photograph of the face ({photo}) was attached.", "|Patient photo: {photo}",
        "See picture {photo}.", "|Facial photograph {photo}", "Photographs {photo} were uploaded.",
        "|Image file: {photo}", "|Attachment: {photo}",
    ),
    "other_id": (
        "|Study ID: {other_id}", "|Subject ID: {other_id}", "|Study Instance UID: {other_id.uid}",
        "Enrolled as research subject {other_id}.", "|Trial ID: {other_id}", "|Series UID {other_id.uid}",
        "|Case ID: {other_id}", "|Specimen number: {other_id}", "|Employee ID: {other_id}",
        "Stored under {other_id.uuid}.", "|UUID: {other_id.uuid}", "|Participant ID {other_id}",
        "|Badge number: {other_id}", "|Report ID: {other_id.uuid}", "|Passport number: {other_id}",
        "|Case #: {other_id}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    text: str
    plants: tuple[tuple[str, int, int], ...]  # kind, start, end


def fill(maker: Maker, wording: str) -> Planted:
    """The wording with values in its slots."""
    text, plants = "", []
    for literal, field, _, _ in string.Formatter().parse(wording):
        text += literal
        if field:
            value = maker.make(field)
            kind = field.split(".")[0]
            if kind != "around":
                plants.append((kind, len(text), len(text) + len(value)))
            text += value
    return Planted(text, tuple(plants))


def plant(rng: Random, report: str, pieces: list[Planted]) -> Planted:
    """The report with each piece set in: lines at its head, its foot or between lines; sentences between sentences."""
    spots = [i + 2 for i in range(len(report)) if report.startswith(". ", i) and report[i + 2].isupper()]
    lines = [0, 0, len(report), *(i + 1 for i, c in enumerate(report) if c == "\n")]
    placed: list[tuple[int, str, Planted]] = []
    for piece in pieces:
        if piece.text[0] == "|":
            bare = Planted(piece.text[1:], tuple((k, a - 1, b - 1) for k, a, b in piece.plants))
            at = rng.choice(lines)
            placed.append((at, "head" if at < len(report) else "foot", bare))
        else:
            placed.append((rng.choice(spots or [0]), "prose", piece))
    placed.sort(key=lambda entry: entry[0])
    text, plants, last = "", [], 0
    for at, where, piece in placed:
        text += report[last:at] + ("\n" if where == "foot" else "")
        plants += [(kind, start + len(text), end + len(text)) for kind, start, end in piece.plants]
        text += piece.text + {"head": "\n", "foot": "", "prose": " "}[where]
        last = at
    text += report[last:]
    if rng.random() < 0.1 and len(text.upper()) == len(text):  # some sites write all in capitals
        text = text.upper()
    return Planted(text, tuple(plants))


def planted_reports(seed: int, *, held_back: bool, count: int) -> list[Planted]:
    """Reports with three to eight wordings each; every kind as often as its weight."""
    rng, maker = Random(seed), Maker(seed)
    wordings = {k: [w for i, w in enumerate(group) if (i % 4 == 3) == held_back] for k, group in WORDINGS.items()}
    turns = {kind: itertools.cycle(rng.sample(group, len(group))) for kind, group in wordings.items()}
    kinds = itertools.cycle([*WORDINGS, "name", "name", "date", "date", "mrn", "accession", "age_over_89", "phone"])
    reports = make_reports.make_texts(count, seed=seed % 1000)
    return [
        plant(rng, row["text"], [fill(maker, next(turns[next(kinds)])) for _ in range(rng.randint(3, 8))])
        for row in reports
    ]


# ---- what looks like an identifier and is none; written with the generator, before the rules

CLEAN = (
    "Hodgkin lymphoma with Reed-Sternberg cells.", "Kerley B lines are present.", "A Baker cyst is seen.",
    "Baker's cyst, ruptured.", "Bosniak IIF cyst of the left kidney.", "Schatzker II tibial plateau fracture.",
    "Chiari I malformation.", "Schatzki ring.", "A Swan-Ganz catheter ends in the main pulmonary artery.",
    "Attenuation of 35 Hounsfield units.", "Foley catheter in place.", "Crohn disease of the terminal ileum.",
    "Alzheimer disease is suspected.", "Parkinson disease.", "No Pancoast tumor.", "Graves disease.",
    "Hill-Sachs deformity and Bankart lesion.", "Lisfranc injury.", "Jones fracture of the fifth metatarsal.",
    "Monteggia fracture.", "Salter-Harris II fracture.", "Colles fracture of the right wrist.",
    "Smith fracture of the distal radius.", "Gustilo type 2 injury.", "Legg-Calve-Perthes disease.",
    "Osgood-Schlatter disease.", "Scheuermann disease.", "Paget disease.", "Warthin tumor of the parotid.",
    "Wilms tumor.", "Ewing sarcoma.", "Kaposi sarcoma.", "Klatskin tumor.", "Krukenberg tumors.",
    "Wegener granulomatosis.", "Takayasu arteritis.", "Kawasaki disease.", "Marfan syndrome.", "Down syndrome.",
    "Turner syndrome.", "Budd-Chiari syndrome.", "May-Thurner anatomy.", "Mallory-Weiss tear.",
    "Meckel diverticulum.", "Zenker diverticulum.", "Bochdalek hernia.", "Morgagni hernia.", "Spigelian hernia.",
    "Morison pouch is clear.", "Pouch of Douglas is free of fluid.", "Whipple procedure.", "Roux-en-Y bypass.",
    "Billroth II.", "Nissen fundoplication.", "Hartmann pouch.", "Kasai procedure.", "Greenfield filter in the IVC.",
    "Hickman line.", "Broviac catheter.", "Dobhoff tube past the pylorus.", "Jackson-Pratt drain.",
    "Harrington rods.", "A Hohn catheter.", "Blake drain.", "Bird's nest filter.", "Port-A-Cath on the right.",
    "Ommaya reservoir.", "BI-RADS 2. Benign.", "BI-RADS category 4B.", "Lung-RADS 4A.", "LI-RADS 5 observation.",
    "PI-RADS 3 lesion.", "TI-RADS TR4.", "O-RADS 2.", "CAD-RADS 3/N.", "Fazekas grade 2.", "ASPECTS score 8.",
    "Gleason 3+4=7.", "Kellgren-Lawrence grade 3.", "ACR density B.", "Fleischner Society guidelines 2017.",
    "RECIST 1.1.", "TNM T2N1M0.", "Modic type 1 change.", "T1 and T2 FLAIR hyperintensity.",
    "T2* GRE and SWI show no blood.", "T1-weighted images.", "STIR, DWI and ADC.", "L4-5 disc bulge.",
    "L4-L5 and L5-S1 levels.", "T12 compression fracture.", "C5-C6 osteophytes.", "Fractures of ribs 5-7.",
    "Mass of 2.5 x 3.1 cm.", "Measures 10.2 x 8.4 x 7.7 cm (volume 345 mL).", "A 12 mm nodule (series 4 image 56).",
    "Series 4, image 56/312.", "Image 1234.", "Series 1002 image 12.", "Previously 8 mm (image 3/45).",
    "5/6 ribs are broken.", "Pain is 3/10.", "Grade 3/4 chondromalacia.", "1/2 of the vertebral body height.",
    "2/3 of the lumen.", "Level 1/2 nodes.", "Axial images at 5 mm, 120 kVp, 250 mAs.", "DLP 456.7 mGy-cm.",
    "CTDIvol 12.34 mGy.", "Total DLP: 1234.56 mGy*cm.", "100 mL of Omnipaque 350 were given.", "Isovue-370, 80 cc.",
    "7 mL Gadavist IV.", "10.5 mCi of F-18 FDG.", "Tc-99m MDP 25.2 mCi.", "Blood glucose 104 mg/dL.", "SUVmax 12.4.",
    "Ejection fraction of 55-60%.", "EF 35-40%.", "Creatinine 1.2, GFR 60.", "Ratio 1:2.", "Agatston score 1250.",
    "Calcium score of 12345.", "Peak velocity 125 cm/s.", "Resistive index 0.65-0.72.", "Heart rate 72.",
    "BP 120/80.", "Gestational age 32 weeks 4 days.", "12w3d.", "EDC by LMP.", "BPD 85 mm.",
    "Fluoroscopy time 2.5 minutes.", "8 French catheter.", "18-gauge needle.", "Time of flight 14:30.",
    "Imaging was done at 14:35 hours.", "65-year-old man.", "A 7 y/o girl.", "89-year-old woman.", "Age 45.",
    "Since 2014, unchanged.", "Comparison: 2015.", "Prior CT from 2018.", "In 1998 a stent was placed.",
    "90% stenosis of the LAD.", "95 degrees of flexion.", "Patient 90 degrees rotated.", "A 90 mm mass.",
    "The patient may return in March.", "This may be artifact.", "Follow-up in 3-6 months.",
    "Follow-up in 6-12 months (1-2 years).", "Dr. was notified.", "Discussed with the referring physician.",
    "Findings were discussed with the ED at the time of the study.", "Discussed with Emergency Department staff.",
    "Read by the on-call resident.", "Patient: None.", "Patient Motion: Mild.", "Name of the medication: Heparin.",
    "Technologist notes: Limited exam.", "Attending physician notified.", "Comparison with MRI.",
    "With Contrast and Without Contrast.", "Findings suggestive of Langerhans cell histiocytosis.",
    "Per Fleischner criteria.", "Date of exam: [DATE]", "Patient: XXXX", "Dr. XXXX was notified.",
    "Compared to XXXX.", "MRN: ___", "Discussed with Dr. ___ at ___.",
    "[**2134-5-6**] [**Hospital1 18**] [**Name (NI) **].", "Dr. [**Last Name (STitle) 123**] was called.",
    "Dr. [NAME] [PHONE]", "MRN: XXXX", "XXXX-year-old male.", "Accession: None.", "Page 1 of 2.",
    "Phone call was made.", "Fax not available.", "ID band in place.", "The account of the patient differs.",
    "Licensed practitioner.", "Portable AP chest at bedside.", "Circle of Willis is patent.", "Ligament of Treitz.",
    "Foramen of Monro.", "Vein of Galen.", "Sylvian fissure.", "Broca area.", "Rolandic region.",
    "Virchow-Robin spaces.", "Rathke cleft cyst.", "Dandy-Walker malformation.", "Sturge-Weber syndrome.",
    "Meniere disease.", "Heberden nodes.", "Bouchard nodes.", "Charcot joint.", "Haglund deformity.",
    "Morton neuroma.", "Achilles tendon.", "Cooper ligament.", "Hartmann's pouch.", "Murphy sign is negative.",
    "McBurney point.", "Lovenox and Coumadin.", "Tylenol 500 mg.", "Rib 10/11.", "Teeth 17 and 32.", "CPT 71260.",
    "ICD-10 J18.9.", "Hemoglobin 9.8.", "WBC 12,300.", "Platelets 250,000.", "Interval change: none.",
    "Technique: CT Chest With Contrast.", "EXAM: CT HEAD WITHOUT CONTRAST", "FINDINGS: NORMAL STUDY.",
    "IMPRESSION: NO ACUTE CARDIOPULMONARY DISEASE.", "The Heart is normal.", "No Acute Disease",
    "Normal Chest X-Ray", "Left Upper Lobe",
)  # fmt: skip


# ---- recall and precision

STRUCTURED = ("date", "phone", "mrn", "accession", "email", "url", "ip", "age_over_89", "zip")
TUNED, UNSEEN = "wordings the rules were tuned on", "wordings held back"


@dataclass(frozen=True)
class Score:
    planted: int
    recall: float  # of the planted, those of which every letter and digit was found, as whatever kind
    found: int
    precision: float  # of the found, those of which at least half of the letters and digits were planted


@cache
def scores(which: str) -> dict[str, Score]:
    """Per kind, on 750 reports with about 4,500 identifiers."""
    planted, hit, found, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    held_back = which == UNSEEN
    for report in planted_reports(HELD_BACK_SEED if held_back else SEED, held_back=held_back, count=750):
        spans = screen(report.text)
        covered = {i for span in spans for i in range(span.start, span.end)}
        truth = {i for _, start, end in report.plants for i in range(start, end)}
        for kind, start, end in report.plants:
            planted[kind] += 1
            hit[kind] += all(i in covered for i in range(start, end) if report.text[i].isalnum())
        for span in spans:
            inside = [i in truth for i in range(span.start, span.end) if report.text[i].isalnum()]
            found[span.kind] += 1
            right[span.kind] += 2 * sum(inside) >= len(inside)
    return {
        kind: Score(planted[kind], hit[kind] / planted[kind], found[kind], right[kind] / max(1, found[kind]))
        for kind in KINDS
    }


@pytest.mark.parametrize("which", [TUNED, UNSEEN])
def test_recall_and_precision_per_kind(which: str) -> None:
    table = scores(which)
    print(f"\n{which}")  # pytest -s shows it
    for kind, score in table.items():
        planted, found = f"{score.planted:4} planted, recall {score.recall:.3f}", f"{score.found:4} found"
        print(f"{kind:12} {planted}; {found}, precision {score.precision:.3f}")
    assert sum(score.planted for score in table.values()) > 4000
    assert all(score.planted >= 100 for score in table.values())
    assert {kind: table[kind].recall for kind in STRUCTURED if table[kind].recall < 0.98} == {}
    assert {kind: score.recall for kind, score in table.items() if kind != "name" and score.recall < 0.97} == {}
    assert table["name"].recall > 0.95
    assert {kind: score.precision for kind, score in table.items() if score.precision < 0.98} == {}


def test_the_generator_is_frozen() -> None:
    """Whoever changes it measures again and puts the figures into docs/deid.md."""
    parts = [repr(WORDINGS), repr((SEED, HELD_BACK_SEED, NAME_LOCALES, CITIES, STATES, SMALL))]
    source = "".join([*parts, *(inspect.getsource(thing) for thing in (Maker, fill, plant, planted_reports))])
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "d15a0bd6ab3b0b02"


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_like_an_identifier(text: str) -> None:
    assert screen(text) == []


def test_reports_without_identifiers_are_clean() -> None:
    texts = [row["text"] for row in make_reports.make_texts(1000, seed=9)]
    assert [found for text in texts for shown in (text, text.upper()) if (found := screen(shown))] == []


# ---- screen


def kinds(text: str) -> list[tuple[str, str]]:
    return [(span.kind, text[span.start : span.end]) for span in screen(text)]


def test_a_header() -> None:
    text = (
        "Patient Name: ROE, JANE Q   MRN: 0012-345\nDOB: 03/04/1931 (91 y/o F)\nAccession #: CT-19-004455\n"
        "Referring: Dr. Kim O'Neil\nFindings: Hodgkin lymphoma, unchanged since 2014. Discussed with Dr. Ng at 14:30."
    )
    assert kinds(text) == [
        ("name", "ROE, JANE Q"),
        ("mrn", "0012-345"),
        ("date", "03/04/1931"),
        ("age_over_89", "91"),
        ("accession", "CT-19-004455"),
        ("name", "Kim O'Neil"),
        ("name", "Ng"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Seen 2019\u201103\u201104.", [("date", "2019\u201103\u201104")]),  # hyphens that do not break
        ("MRN:\u00a01234567", [("mrn", "1234567")]),
        ("Dr. O\u2019Neil was paged.", [("name", "O\u2019Neil")]),
        ("MRN:\n1234567", [("mrn", "1234567")]),
        ("Age 89. Age 90.", [("age_over_89", "90")]),
        ("Since 3/14; pain 3/10; image 3/12; on 3/45.", [("date", "3/14")]),
        ("Lives in Boston, MA 02114.", [("geographic", "Boston"), ("zip", "02114")]),
        ("Patient: XXXX, MRN 1234567", [("mrn", "1234567")]),
        ("[DATE] 03/04/2019 [NAME]", [("date", "03/04/2019")]),
        ("", []),
        ("Dr. ", []),
        ("\ud800 Dr. Roe", [("name", "Roe")]),  # a lone surrogate, as undecodable bytes leave it
    ],
)
def test_screen_cases(text: str, expected: list[tuple[str, str]]) -> None:
    assert kinds(text) == expected


def test_kinds_cover_the_letters_of_safe_harbor() -> None:
    assert set(HIPAA.values()) == set("ABCDEFGHIJKLMNOPQR")
    assert set(KINDS) == set(WORDINGS)  # each is planted
    docs = (ROOT / "docs" / "deid.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in docs] == []
    assert "screening, not certification" in docs.lower()


SNIPPETS = st.sampled_from(
    [
        "Dr. ", "Smith", " John ", "MRN: ", "1234567", "03/04/2019", "[DATE]", "[NAME]", "XXXX", "[**", "**]", "___",
        ", MD", "Patient: ", "\n", "a@b.org", "http://", "www.", ".com", "2001:db8::1", "Address: ", " Street", "12 ",
        "March ", "5, ", "91", "-year-old", " yo", "call ", "555-1234", "Boston, ", "MA ", "02114", "discussed with ",
        "signed by ", ".", " ", "I, ", "General Hospital", "lives in ", "(01)", "00643169007222", "wife ", "\0", "é",
        "\u2013", "İ", "ninety", "\ud800", "²", "١", "Jones, ", "is a ", "man", "fax ", "10.1.2.3", "-", "/", "T12:30",
    ]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.one_of(SNIPPETS, st.text(max_size=3)), max_size=25).map("".join))


@settings(max_examples=600, deadline=None)
@given(TEXTS)
def test_properties_of_any_text(text: str) -> None:
    found = screen(text)
    assert all(0 <= span.start < span.end <= len(text) and span.kind in HIPAA and span.rule for span in found)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    clean = redact(text)
    assert screen(clean) == []
    assert redact(clean) == clean
    surrogate = replace(text, key=b"key", patient="p")
    assert surrogate == replace(text, key=b"key", patient="p", found=found)
    kept = [text[a.end : b.start] for a, b in itertools.pairwise([Identifier("", 0, 0, ""), *found])]
    assert all(piece in surrogate for piece in kept)


def test_time_grows_with_the_length_alone() -> None:
    """Texts made to send a backtracking expression astray; any quadratic one takes minutes."""
    start = time.perf_counter()
    pieces = ("A", "Ab ", "A, ", "1", "1/", "1.", "1-2 ", "a@a.", "[**", "::1", "Dr. A ", "Address: A. ", "X", "Aa-")
    for piece in (*pieces, "9 ", "12 A ", "Hospital ", "call ", "A. "):
        screen(piece * (30_000 // len(piece)))
        screen(f"{piece * (3_000 // len(piece))}, MD Hospital Street March")
    assert time.perf_counter() - start < 20


# ---- redact and replace


def test_redact() -> None:
    text = "Dr. Roe saw Mr. Doe (MRN 1234567) on 03/04/2019."
    assert redact(text) == "Dr. [NAME] saw Mr. [NAME] (MRN [MRN]) on [DATE]."
    assert redact(text, [span for span in screen(text) if span.kind == "date"]) == text.replace("03/04/2019", "[DATE]")
    assert redact("A 7 mm nodule.") == "A 7 mm nodule."


KEY = b"a secret of the site"
FORMATS = (
    "%m/%d/%Y", "%m/%d/%y", "%Y-%m-%d", "%Y/%m/%d", "%Y%m%d", "%m-%d-%Y", "%d.%m.%Y", "%B %d, %Y", "%b %d, %Y",
    "%b. %d, %Y", "%d %B %Y", "%d-%b-%Y", "%d%b%Y", "%A, %B %d, %Y", "%B %d %Y", "%b-%d-%Y", "%Y-%m-%dT10:22:07",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_a_patients_dates_move_by_the_same_days_in_their_format(form: str) -> None:
    """strptime is the oracle: it reads the new date by the old format; strftime would not write a wrong weekday."""
    moved = set()
    for day in (datetime.date(2019, 3, 14), datetime.date(2020, 2, 29), datetime.date(2008, 1, 1)):
        new = replace(f"Unchanged since {day.strftime(form)} at 14:30.", key=KEY, patient="7")
        assert new.startswith("Unchanged since ")
        assert new.endswith(" at 14:30.")
        value = new.removeprefix("Unchanged since ").removesuffix(" at 14:30.")
        read = datetime.datetime.strptime(value, form)
        assert read.strftime(form).replace(" 0", " ") == value.replace(" 0", " ")
        moved.add((day - read.date()).days)
    by_iso = datetime.date(2019, 3, 14) - datetime.date.fromisoformat(replace("2019-03-14", key=KEY, patient="7"))
    assert moved == {by_iso.days}
    assert 1 <= by_iso.days <= 365


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("March 3rd, 2019", "February 21st, 2019"),
        ("the 11th of March 2019", "the 1st of March 2019"),
        ("5/6/2019", "4/26/2019"),
        ("25/12/2018", "15/12/2018"),
        ("13.1.19", "3.1.19"),
        ("MARCH 2019", "MARCH 2019"),
        ("01/2019", "01/2019"),
        ("3/5", "2/23"),
        ("Jan 4", "Dec 25"),
        ("Sunday, March 3, 2019", "Thursday, February 21, 2019"),
        ("20190303102207", "20190221102207"),
        ("12JAN19", "2JAN19"),
        ("02/30/2019", None),
        ("Smarch", None),
        ("", None),
    ],
)
def test_earlier(old: str, new: str | None) -> None:
    assert deid._earlier(old, 10) == new


def test_surrogates_are_consistent_and_of_the_same_form() -> None:
    text = (
        "Patient: SMITH, JOHN. Mr. Smith, MRN 123-45-67, aged 93, was seen by Dr. Anna von Berg, call (617) 555-0142. "
        "MRN: 1234567. Mail to john.smith@example.org. See https://example.org/a1. Lives at 12 Oak Street, Boston, "
        "MA 02114. CT done at Springfield General Hospital. Ninety-one years old."
    )
    new = replace(text, key=KEY, patient="7")
    pattern = (
        r"Patient: ([A-Z]+), ([A-Z]+)\. Mr\. ([A-Z][a-z]+), MRN (\d{3}-\d\d-\d\d), aged 89, was seen by "
        r"Dr\. [A-Z][a-z]+ von [A-Z][a-z]+, call \(\d{3}\) \d{3}-\d{4}\. MRN: (\d{7})\. Mail to "
        r"[a-z]{4}\.[a-z]{5}@[a-z]{7}\.org\. See https://[a-z]{7}\.[a-z]{3}/[a-z]\d\. Lives at \d\d [A-Z][a-z]+ "
        r"Street, [A-Z][a-z]+, MA \d{5}\. CT done at [A-Z][a-z]+ General Hospital\. Eighty-nine years old\."
    )
    found = re.fullmatch(pattern, new)
    assert found, new
    last, first, again, dashed, plain = found.groups()
    assert last.title() == again != "Smith"
    assert first != "JOHN"
    assert dashed.replace("-", "") == plain != "1234567"
    for other in (replace(text, key=KEY, patient="8"), replace(text, key=b"other", patient="7")):
        assert not set(re.findall(r"\d{7}|\d{5}\b", other)) & set(re.findall(r"\d{7}|\d{5}\b", new))
    assert replace(text, key=KEY, patient="7", found=[]) == text


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ValueError, match="secret key"):
        replace("Dr. Roe", key=b"", patient="7")


# ---- Presidio


def test_presidio_is_asked_for_by_name_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    deid._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ImportError, match=r"radllama\[presidio\]"):
        screen_with_presidio("Dr. Roe")


def test_presidio_adds_to_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Jolanta walked in on 03/04/2019 for 2 weeks."

    class AnalyzerEngine:
        def analyze(self, text: str, language: str) -> list[SimpleNamespace]:
            assert language == "en"
            spans = [("PERSON", "Jolanta"), ("DATE_TIME", "2 weeks"), ("LOCATION", "on 03")]
            return [
                SimpleNamespace(entity_type=kind, start=text.index(part), end=text.index(part) + len(part))
                for kind, part in spans
            ]

    deid._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=AnalyzerEngine))
    found = [(span.kind, text[span.start : span.end]) for span in screen_with_presidio(text)]
    deid._analyzer.cache_clear()
    assert found == [("name", "Jolanta"), ("date", "on 03/04/2019")]
