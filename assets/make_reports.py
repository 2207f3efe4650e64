"""Make a synthetic radiology corpus whose impressions follow from their findings by fixed rules.

    python assets/make_reports.py pairs --out assets/reports             # the splits, always the same bytes
    python assets/make_reports.py text --count 40000 --seed 1 --output text.jsonl        # to pre-train on

A report is a walk through the regions of one exam. CONTENT lists the regions with their normal statements,
the findings with their wordings, and what an impression says of each. An impression is a pure function of
what the findings state: positives in order of clinical importance, two or three joined where together they
are one diagnosis, numbered where there are several, with recommendations derived from kind and size. Where
nothing acute was found it opens with a statement of that, which also repeats the negative statements that
answer the indication; minor findings come last; variants stay out.

Rules of the splits:

1. Train, validation and test come from different seeds; plain text comes from seeds of its own.
2. A hash holds out one in six pairs of findings of an exam (of those that can occur together and that no
   combined diagnosis joins). Only test reports hold such pairs: every test report with two or more positives
   holds at least one.
3. A hash reserves one in six attribute combinations (side, place, size ...) of each finding that has twelve
   or more. Only test reports hold them: a test report whose one positive is such a finding always does.
4. No findings text occurs twice, within or across splits, and no plain-text report has the findings of a
   validation or test report. A patient is in one split only.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")
Attributes = dict[str, str]

SEED = 20408
COUNTS = {"test": 300, "validation": 200, "train": 3600}  # in the order of making
MIN_WORDS, MAX_WORDS = 30, 110  # of a findings text
LEVELS = ("acute", "minor", "variant")  # of findings; the impression leaves variants out
POSITIVE_SHARES = (0.28, 0.25, 0.23, 0.15, 0.09)  # of reports with 0, 1, 2, 3, 4 positives

# The values of placeholders. A range stands for its steps of 1 mm or 0.1 cm, named "dims" for two diameters.
POOLS = """
side=right|left
sev=mild|moderate|severe
vol=small|moderate|large
lobe=right upper lobe|right middle lobe|right lower lobe|left upper lobe|left lower lobe
rib=third|fourth|fifth|sixth|seventh|eighth
pole=upper pole|interpolar region|lower pole
third=upper|mid|lower
hepatic=right hepatic lobe|left hepatic lobe|caudate lobe
cerebral=frontal lobe|parietal lobe|temporal lobe|occipital lobe
stroke=insula|lentiform nucleus|frontal operculum|occipital lobe|medial temporal lobe|paramedian frontal lobe
artery=middle cerebral artery|posterior cerebral artery|anterior cerebral artery
quad=upper outer quadrant|upper inner quadrant|lower outer quadrant|lower inner quadrant
quadrant=right lower quadrant|left lower quadrant|pelvis
part=knee|ankle|wrist|elbow|shoulder|hip
count=two|three|four|five
aneurysm=anterior communicating artery|posterior communicating artery|basilar tip
depth=anterior|middle|posterior
density=almost entirely fatty|of scattered fibroglandular density|heterogeneously dense|extremely dense
n_kidney=9.6..12.2cm
n_spleen=8.4..11.8cm
n_duct=2..5mm
n_isthmus=2..4mm
n_aorta=1.5..2.3cm
n_goiter=5.4 x 2.6 x 2.4 cm|5.7 x 2.9 x 2.6 cm|6.0 x 3.1 x 2.8 cm|6.2 x 3.3 x 3.0 cm
n_thyroid=4.0 x 1.4 x 1.3 cm|4.3 x 1.5 x 1.4 cm|4.6 x 1.7 x 1.5 cm|4.8 x 1.6 x 1.4 cm|5.0 x 1.8 x 1.6 cm
"""
BY_PART: dict[str, dict[str, tuple[str, ...]]] = {  # bones and directions of dislocation
    "knee": {"bone": ("distal femur", "patella", "tibial plateau", "proximal fibula")},
    "ankle": {"bone": ("lateral malleolus", "medial malleolus", "distal tibia", "talus")},
    "wrist": {"bone": ("distal radius", "ulnar styloid", "scaphoid", "lunate"), "dir": ("dorsal", "volar")},
    "elbow": {"bone": ("radial head", "olecranon", "distal humerus", "coronoid process")},
    "shoulder": {"bone": ("proximal humerus", "greater tuberosity", "distal clavicle", "acromion")},
    "hip": {"bone": ("femoral neck", "greater trochanter", "proximal femur", "acetabulum")},
}
DIRECTIONS = ("anterior", "posterior")
ARTERIES = {
    "insula": "middle",
    "lentiform nucleus": "middle",
    "frontal operculum": "middle",
    "occipital lobe": "posterior",
    "medial temporal lobe": "posterior",
    "paramedian frontal lobe": "anterior",
}
BIRADS = {
    "1": "Negative",
    "2": "Benign",
    "3": "Probably benign",
    "4": "Suspicious",
    "5": "Highly suggestive of malignancy",
}


def steps(first: str, *levels: tuple[float, str]) -> Callable[[str], str]:
    """A rule from a measurement ("4.2 cm") to the text of the highest level that it reaches."""

    def rule(value: str) -> str:
        size = float(value.split()[0])
        return next((text for limit, text in reversed(levels) if size >= limit), first)

    return rule


# Placeholder -> (the attribute it follows from, rule). Thresholds after Fleischner 2017 (solid nodules), ACC/
# AHA 2022 (thoracic aorta), SVS 2018 (abdominal aorta), ESGAR 2022 (gallbladder polyps), ACR TI-RADS 2017.
DERIVED: dict[str, tuple[str, Callable[[str], str]]] = {
    "side": ("lobe", lambda value: value.split()[0]),
    "artery": ("stroke", lambda value: f"{ARTERIES[value]} cerebral artery"),
    "sevly": ("sev", lambda value: f"{value}ly"),
    "dirly": ("dir", lambda value: f"{value}ly"),
    "largest": ("dims", lambda value: f"{value.split()[0]} {value.split()[-1]}"),
    "stanford": ("segment", lambda value: "A" if value == "ascending" else "B"),
    "surgeon": (
        "segment",
        lambda value: (
            "Recommend emergent cardiac surgery consultation."
            if value == "ascending"
            else "Recommend vascular surgery consultation."
        ),
    ),
    "drain": (
        "vol",
        lambda value: "Recommend follow-up radiograph." if value == "small" else "Consider chest tube placement.",
    ),
    "fleischner": (
        "size",
        steps(
            "No routine follow-up needed.",
            (6, "Recommend follow-up CT in 6 to 12 months."),
            (9, "Recommend PET/CT or tissue sampling."),
        ),
    ),
    "taa": (
        "size",
        steps(
            "Recommend annual imaging.",
            (5.0, "Recommend imaging in 6 months."),
            (5.5, "Recommend cardiac surgery consultation."),
        ),
    ),
    "aaa": (
        "size",
        steps(
            "Recommend ultrasound in 3 years.",
            (4.0, "Recommend ultrasound in 12 months."),
            (5.0, "Recommend ultrasound in 6 months."),
            (5.5, "Recommend vascular surgery consultation."),
        ),
    ),
    "polyp": (
        "size",
        steps(
            "No follow-up needed.",
            (6, "Recommend follow-up ultrasound in 6 months."),
            (10, "Recommend surgical consultation."),
        ),
    ),
    "tr3": ("size", steps("No follow-up needed.", (1.5, "Recommend follow-up ultrasound."), (2.5, "Recommend FNA."))),
    "tr4": ("size", steps("No follow-up needed.", (1.0, "Recommend follow-up ultrasound."), (1.5, "Recommend FNA."))),
    "tr5": ("size", steps("Recommend follow-up ultrasound.", (1.0, "Recommend FNA."))),
    "adenoma": ("size", steps("microadenoma", (10, "macroadenoma"))),
}

# One block per exam. "[a|b]" are alternatives within a wording; " / " or a new indented line starts another
# one; a line that starts with "&" goes on with the one before.
#   = key | modality | body part | title | technique
#   normal   impression when nothing is wrong | its opening with only minor findings (default: the same)
#   given    attributes drawn once for the whole report
#   why      indications
#   ask      slot region | indication | negative statement in the findings | the same in the impression
#   @ region | normal wordings when nothing is found there | slot: wordings when something else is found there
#            ("@!": left out for brevity only above MAX_WORDS, or never where it states a given attribute)
#   acute, minor, variant: the findings that follow, the most important first
#   key regions slots attributes > impression      (then the wordings of the findings)
#            said in the first region; the regions named then do not say that they are normal; two findings
#            with a slot in common never occur together
#   + keys shared attributes > impression of the combined diagnosis, which ranks as its first key
CONTENT = """
= chest-xray | CR | chest | Chest radiograph, two views
  | [Frontal and lateral|PA and lateral] views of the chest.
normal No acute cardiopulmonary abnormality.
why Cough and fever. | Shortness of breath. | Chest pain. | Preoperative evaluation. | Wheezing.
ask fracture bones | Fall with chest pain. | No cortical [step-off|break] is seen along the ribs.
  | No rib fracture.
ask tb lungs | Positive tuberculin test. | The apices show no [cavity|scarring]. | No sign of tuberculosis.
ask freeair abdomen | Acute abdominal pain. | No [air|gas] lies beneath the diaphragm. | No pneumoperitoneum.
@ airway | The trachea is midline. / The trachea and main bronchi are midline and patent.
@! lungs | The lungs are clear[| bilaterally]. / Both lungs are [well expanded|well aerated] without opacity.
  | consolidation: No [focal|airspace] consolidation. | edema: The pulmonary vasculature is [normal|distinct].
@! pleura | No pleural effusion or pneumothorax[| is seen]. / The costophrenic angles are sharp.
  | effusion: No pleural effusion[| is seen]. | pneumothorax: No pneumothorax[| is identified].
@! heart | The [heart|cardiac silhouette] is normal in size. / Heart size is [normal|within normal limits].
@! mediastinum | The mediastinal[ and hilar|] contours are [normal|unremarkable].
@ bones | No acute osseous abnormality. / The visualized [bones|osseous structures] are intact.
@ abdomen | The [visualized|included] upper abdomen is unremarkable.
acute
ptx pleura pneumothorax vol side > {vol} {side} pneumothorax. {drain}
  A {vol} amount of air [is seen|lies] in the {side} pleural space[| with a visible visceral pleural line].
freeair abdomen freeair side > Pneumoperitoneum. Recommend urgent surgical consultation.
  A crescent of lucency [is seen|lies] beneath the {side} hemidiaphragm.
mass lungs nodule lobe dims=3.1..7.5cm > {largest} {lobe} mass, suspicious for malignancy.
  A [lobulated|spiculated|large] opacity measuring {dims} [projects over|is centered in] the {lobe}.
pneumonia lungs consolidation lobe > {lobe} pneumonia.
  [Patchy|Confluent|Dense] airspace opacity is [seen|present] in the {lobe}[| with air bronchograms].
edema lungs edema sev > {sev} interstitial pulmonary edema.
  There is {sev} thickening of the interstitial markings with [Kerley B lines|peribronchial cuffing].
effusion pleura effusion vol side > {vol} {side} pleural effusion.
  [Blunting|Obscuration] of the {side} costophrenic angle indicates {vol} volume fluid.
effusions pleura effusion vol > {vol} bilateral pleural effusions.
  [Both|The right and left] costophrenic angles are blunted by {vol} volume fluid.
nodule lungs nodule lobe size=6..29mm > {size} {lobe} nodule. Recommend chest CT.
  A [rounded|well-defined|faint] opacity measuring {size} [projects over|is seen in] the {lobe}.
ribfx bones fracture side rib > Acute {side} {rib} rib fracture.
  [A cortical break is seen|There is cortical disruption] along the {rib} rib on the {side}.
cardiomegaly heart heart sev > {sev} cardiomegaly.
  The [heart|cardiac silhouette] is {sevly} enlarged. / There is {sev} enlargement of the cardiac silhouette.
minor
wedge bones spine sev level=T6|T7|T8|T11|T12 > {sev} {level} compression deformity, age indeterminate.
  There is {sev} anterior wedging of the {level} vertebral body. / {level} shows {sev} anterior height loss.
copd lungs inflation > Chronic obstructive pulmonary disease.
  The lungs are hyperinflated with flattening of the [hemidiaphragms|diaphragm].
atelectasis lungs atelectasis side > {side} basilar atelectasis.
  [Linear|Bandlike|Plate-like] opacities with volume loss are [seen|present] at the {side} lung base.
hernia abdomen fundus vol > {vol} hiatal hernia.
  A {vol} retrocardiac [density|opacity] contains an air-fluid level.
variant
spurs bones spurs > [Mild|Minor] degenerative [changes|spurs] are noted in the thoracic spine.
clips abdomen clips > Surgical clips [are noted|project] in the right upper quadrant.
pacer heart pacer > A [dual-lead|single-lead] pacemaker overlies the left chest.
aorta mediastinum aorta > The aortic [arch|knob] is calcified. / The thoracic aorta is [mildly|] tortuous.
+ cardiomegaly edema effusions
  > Congestive heart failure with {edema_sev} edema and {effusions_vol} effusions.
+ cardiomegaly edema > Congestive heart failure with {edema_sev} edema.
+ pneumonia effusion side > {pneumonia_lobe} pneumonia with {effusion_vol} parapneumonic effusion.

= chest-ct | CT | chest | CT of the chest with contrast
  | Axial images of the chest [after|with] intravenous contrast.
normal No acute abnormality in the chest.
why Shortness of breath. | Chest pain. | Chronic cough. | Abnormal radiograph. | Hemoptysis. | Weight loss.
ask pe vessels | Elevated D-dimer. | The pulmonary arteries [opacify fully|show no filling defect].
  | No pulmonary embolism.
ask hila nodes | Suspected sarcoidosis. | No [perihilar|upper lobe] nodularity is seen.
  | No sign of sarcoidosis.
ask fracture bones | Motor vehicle collision. | No cortical [step-off|break] of the ribs or sternum.
  | No thoracic fracture.
@ lungs | The lungs are clear[| without nodule or consolidation].
  / No nodule or consolidation is [seen|present].
  | consolidation: No [focal|airspace] consolidation[| is seen].
@ airways | The [central airways|trachea and main bronchi] are patent.
@ pleura | No pleural effusion or pneumothorax. / The pleural spaces are [clear|dry].
@ heart | The heart is normal in size without pericardial effusion. / The heart and pericardium are normal.
  | pericardium: No pericardial effusion. | rv: The cardiac chambers are normal in size.
@ vessels | The thoracic aorta is normal in caliber. / The great vessels are [normal|unremarkable].
  | aorta: The thoracic aorta is normal in caliber.
@ nodes | No enlarged mediastinal or hilar lymph nodes. / No thoracic adenopathy by size criteria.
@ abdomen | Limited images of the upper abdomen are unremarkable. / The included upper abdomen is normal.
@ bones | No aggressive osseous lesion. / The osseous structures are [normal|unremarkable].
acute
dissection vessels aorta segment=ascending|descending > Stanford type {stanford} aortic dissection. {surgeon}
  An intimal flap [is seen|is present|extends] in the {segment} thoracic aorta.
pe vessels pe side lobar=upper|lower > Acute {side} {lobar} lobe pulmonary embolism.
  A [filling defect|central filling defect] [occupies|expands] the {side} {lobar} lobe pulmonary artery.
rv heart rv > Right ventricular dilatation.
  The right ventricle is [larger than the left|enlarged] with [flattening|bowing] of the septum.
mass lungs nodule lobe dims=3.1..8.0cm > {largest} {lobe} mass, suspicious for lung cancer. Recommend PET/CT.
  A [spiculated|lobulated] soft tissue lesion measuring {dims} [is centered in|occupies] the {lobe}.
pneumonia lungs consolidation lobe > {lobe} pneumonia.
  [Confluent|Dense|Patchy] airspace opacity with air bronchograms [fills|is present in] the {lobe}.
pericardium heart pericardium vol > {vol} pericardial effusion.
  A {vol} amount of fluid surrounds the [heart|cardiac chambers].
effusion pleura effusion vol side > {vol} {side} pleural effusion.
  [A {vol} amount of|{vol} volume] fluid layers dependently in the {side} hemithorax.
nodule lungs nodule lobe size=3..14mm > {size} solid {lobe} nodule. {fleischner}
  A solid [noncalcified|round|smooth] focus measuring {size} is [seen|present] in the {lobe}.
aneurysm vessels aorta size=4.2..6.2cm > {size} ascending aortic aneurysm. {taa}
  The ascending aorta is dilated[, measuring|, with a maximum diameter of] {size}.
nodes nodes nodes,hila station=subcarinal|prevascular|right_paratracheal|left_hilar size=12..29mm
  > {station} lymphadenopathy measuring {size}.
  / [An enlarged|A bulky] {station} node is {size} in short axis.
ribfx bones fracture side rib > Acute {side} {rib} rib fracture.
  [A cortical break is seen|There is cortical disruption] along the {rib} rib on the {side}.
minor
emphysema lungs emphysema sev > {sev} centrilobular emphysema.
  [Upper lobe predominant|Scattered] centrilobular lucencies of {sev} degree are present.
coronary heart coronary sev > {sev} coronary atherosclerosis.
  There are {sev} [calcifications of|calcified plaques in] the coronary arteries.
hernia abdomen fundus vol > {vol} hiatal hernia.
  A {vol} portion of the stomach [herniates|protrudes] through the esophageal hiatus.
variant
dependent lungs dependent > Dependent [opacities reflect|changes are due to] shallow inspiration.
granuloma lungs granuloma > A calcified granuloma is [incidentally|] noted.
spurs bones spurs > Degenerative changes are [noted|present] in the thoracic spine.
+ pe rv > Acute {pe_side} {pe_lobar} lobe pulmonary embolism with right heart strain.
+ mass nodes
  > {mass_largest} {mass_lobe} mass, suspicious for lung cancer with {nodes_size} {nodes_station} metastasis.
+ pneumonia effusion side > {pneumonia_lobe} pneumonia with {effusion_vol} parapneumonic effusion.

= abdomen-ct | CT | abdomen and pelvis | CT of the abdomen and pelvis with contrast
  | [Portal venous phase|Axial] images.
normal No acute abnormality in the abdomen or pelvis.
why Abdominal pain. | Nausea and vomiting. | Weight loss. | Fever of unknown origin. | Abdominal distension.
ask appendix bowel | Right lower quadrant pain. | The appendix is [thin-walled|slender and air-filled].
  | Normal appendix.
ask groin pelvis | Groin bulge. | The inguinal canals are [normal|intact]. | No inguinal hernia.
ask stone kidneys | Flank pain. | No [renal or ureteral|urinary tract] calcification is seen.
  | No urolithiasis.
@ liver | The liver is [normal in size and contour|homogeneous without focal lesion|unremarkable].
@ gallbladder | The gallbladder is [normal|unremarkable].
  / No gallbladder wall thickening or biliary dilatation.
@ pancreas | The pancreas [is normal|enhances normally]. / No pancreatic ductal dilatation.
@ spleen | The spleen is [normal in size|unremarkable]. / The spleen measures {n_spleen} in length.
@ adrenals | The adrenal glands are [normal|unremarkable].
@ kidneys | The kidneys enhance symmetrically without hydronephrosis.
  / Both kidneys are [normal|unremarkable].
  | mass: No [solid|enhancing] renal lesion.
@ bowel | The bowel is normal in caliber[| without wall thickening]. / No bowel obstruction or inflammation.
@ peritoneum | No free air or free fluid. / No ascites or pneumoperitoneum.
@ vessels | The abdominal aorta is normal in caliber. / The abdominal aorta measures {n_aorta} in diameter.
@ nodes | No enlarged abdominal or pelvic lymph nodes. / No adenopathy by size criteria.
@ pelvis | The pelvic organs are [normal|unremarkable]. / The bladder is [normal|unremarkable].
@ bones | No acute osseous abnormality. / No aggressive osseous lesion.
acute
freeair peritoneum freeair > Pneumoperitoneum. Recommend urgent surgical consultation.
  [Foci|Locules] of extraluminal gas are seen [beneath the anterior abdominal wall|adjacent to the liver].
appendicitis bowel appendix size=9..16mm quadrant=right_lower_quadrant > Acute appendicitis.
  The appendix is dilated to {size} with [mural|wall] thickening and [adjacent|periappendiceal] fat stranding.
obstruction bowel caliber size=3.1..5.4cm quadrant
  > Small bowel obstruction, transition point in the {quadrant}.
  Dilated small bowel loops measure up to {size} and [narrow abruptly|taper] in the {quadrant}.
stone kidneys stone side ureter=proximal|mid|distal size=3..11mm > {size} {ureter} {side} ureteral stone.
  A [calcification|calcific focus] measuring {size} is lodged in the {ureter} {side} ureter.
hydro kidneys hydro side sev > {sev} {side} hydronephrosis.
  There is {sev} dilatation of the {side} renal [collecting system|pelvis and calyces].
abscess peritoneum abscess quadrant dims=2.2..7.0cm > {largest} abscess in the {quadrant}.
  A rim-enhancing [fluid|gas-containing] collection measuring {dims} [lies|is seen] in the {quadrant}.
pancreatitis pancreas pancreas > Acute interstitial pancreatitis.
  The pancreas is [edematous|enlarged] with peripancreatic [fat stranding|inflammatory change].
liver liver liver dims=1.4..6.0cm couinaud=II|III|IVa|V|VI|VII|VIII
  > Hepatic metastases, largest {largest} in segment {couinaud}.
  / [Multiple|Numerous] hypoattenuating liver lesions are present, up to {dims} in segment {couinaud}.
renal kidneys mass side dims=2.1..7.5cm > {largest} {side} renal mass, suspicious for renal cell carcinoma.
  An enhancing solid [lesion|mass] arising from the {side} kidney measures {dims}.
panc pancreas pancreas portion=head|body|tail dims=1.8..5.0cm
  > {largest} pancreatic {portion} mass, suspicious for adenocarcinoma.
  A hypoenhancing lesion measuring {dims} [is centered in|expands] the {portion} of the pancreas.
aaa vessels aorta size=3.2..6.8cm > {size} abdominal aortic aneurysm. {aaa}
  The infrarenal aorta is [aneurysmal|dilated], {size} in diameter.
diverticulitis bowel colon seg=sigmoid|descending quadrant=left_lower_quadrant > Acute {seg} diverticulitis.
  [Wall thickening|Fat stranding] surrounds an inflamed diverticulum of the {seg} colon.
cirrhosis liver liver > Cirrhosis.
  The liver has a nodular contour with [caudate hypertrophy|a shrunken right lobe].
ascites peritoneum ascites vol > {vol} volume ascites.
  A {vol} amount of [free|simple] fluid is present in the [peritoneal cavity|paracolic gutters and pelvis].
spleen spleen spleen size=13.2..19.0cm > Splenomegaly, {size}.
  The spleen is enlarged[, measuring| at] {size} in length.
minor
adenoma adrenals adrenal side size=1.1..2.9cm > {size} {side} adrenal adenoma.
  A low-density nodule of the {side} adrenal gland measures {size}.
steatosis liver liver > Hepatic steatosis.
  The liver is [diffusely low in attenuation|lower in attenuation than the spleen].
cyst kidneys cyst side size=1.0..5.8cm > {size} simple {side} renal cyst.
  A fluid-density lesion of the {side} kidney [measures {size}|is {size} in diameter] without enhancement.
diverticulosis bowel colon > Colonic diverticulosis.
  [Scattered|Multiple] colonic outpouchings are present without surrounding inflammation.
variant
clips gallbladder gallbladder > The gallbladder is surgically absent. / Cholecystectomy clips are noted.
splenule spleen splenule > An accessory spleen is [incidentally|] noted.
plaque vessels plaque > Calcified plaque lines the [abdominal aorta|aorta and iliac arteries].
spurs bones spurs > Degenerative [disc|facet] changes are noted in the lumbar spine.
+ stone hydro side
  > Obstructing {stone_size} {stone_ureter} {stone_side} ureteral stone with {hydro_sev} hydronephrosis.
+ appendicitis abscess quadrant > Perforated appendicitis with {abscess_largest} abscess.
+ panc liver
  > {panc_largest} pancreatic {panc_portion} mass, suspicious for adenocarcinoma
  & with hepatic metastases up to {liver_largest}.
+ diverticulitis abscess quadrant
  > Perforated {diverticulitis_seg} diverticulitis with {abscess_largest} abscess.
+ cirrhosis ascites spleen > Cirrhosis with portal hypertension and {ascites_vol} volume ascites.

= brain-mr | MR | brain | MRI of the brain with and without contrast | Multiplanar multisequence images.
normal No acute intracranial abnormality.
why Headache. | Dizziness. | Altered mental status. | Memory loss. | Focal weakness. | Visual disturbance.
ask hippocampus parenchyma | Seizure. | The hippocampi are symmetric in [size|volume].
  | No epileptogenic focus.
ask canal brainstem | Hearing loss. | The internal auditory canals are [clear|symmetric].
  | No vestibular schwannoma.
ask white parenchyma | Paresthesias. | The corpus callosum is [normal|free of lesions].
  | No sign of demyelination.
@ diffusion | No restricted diffusion[| is seen]. / Diffusion-weighted images are [normal|unremarkable].
@ hemorrhage | No [intracranial|] hemorrhage or extra-axial collection. / No abnormal susceptibility.
@ parenchyma | The brain parenchyma is normal in signal. / Gray and white matter signal is normal.
@ enhancement | No [abnormal|pathologic] enhancement[| is seen]. / No enhancing lesion.
@ ventricles | The ventricles [and sulci|] are normal in size. / The ventricular system is [normal|midline].
@ vessels | The major [intracranial|arterial] flow voids are preserved.
@ sella | The pituitary gland is [normal|unremarkable].
@ brainstem | The [brainstem and cerebellum|posterior fossa structures] are [normal|unremarkable].
@ sinuses | The paranasal sinuses [and mastoid air cells|] are clear.
@ calvarium | The calvarium is intact. / Marrow signal is normal.
acute
shift hemorrhage,ventricles blood side size=11..19mm mid=4..10mm
  > {size} {side} subdural hematoma with {mid} midline shift.
  A crescentic {side} convexity collection, {size} thick, displaces the septum pellucidum by {mid}.
subdural hemorrhage blood side size=3..10mm > {size} {side} subdural hematoma.
  A crescentic [extra-axial|] collection over the {side} convexity is {size} thick.
hematoma hemorrhage,parenchyma blood side cerebral dims=1.2..5.0cm > {largest} {side} {cerebral} hemorrhage.
  [T1 hyperintensity|Blooming] within the {cerebral} on the {side} measures {dims}.
infarct diffusion,parenchyma infarct side stroke > Acute {side} {artery} territory infarct.
  Restricted diffusion [is seen|is present] in the {side} {stroke}.
occlusion vessels vessel side artery > {side} {artery} occlusion.
  The flow void of the {side} {artery} is [absent|lost].
hydrocephalus ventricles ventricles sev > {sev} hydrocephalus.
  The [lateral and third|lateral] ventricles are {sevly} dilated out of proportion to the sulci.
glioma enhancement,parenchyma mass side cerebral dims=2.0..6.5cm
  > {largest} {side} {cerebral} mass, suspicious for glioma.
  A [heterogeneous|necrotic] enhancing lesion with edema in the {cerebral} on the {side} measures {dims}.
metastases enhancement mass count size=5..19mm > {count} brain metastases, the largest {size}.
  {count} [ring-enhancing|enhancing] nodules are seen at the gray-white junction, up to {size}.
aneurysm vessels vessel aneurysm size=3..14mm
  > {size} {aneurysm} aneurysm. Recommend CT angiography.
  / A [saccular|lobulated] outpouching of the {aneurysm} measures {size}.
meningioma enhancement mass side dura=frontal_convexity|parietal_convexity|sphenoid_wing dims=1.1..4.5cm
  > {largest} {side} {dura} meningioma.
  / A dural-based [homogeneously|avidly] enhancing lesion along the {side} {dura} measures {dims}.
schwannoma brainstem,enhancement canal side size=4..18mm > {size} {side} vestibular schwannoma.
  An enhancing [nodule|lesion] measuring {size} [fills|expands] the {side} internal auditory canal.
adenoma sella,enhancement pituitary side size=4..19mm > {size} {side} pituitary {adenoma}.
  A hypoenhancing lesion in the {side} half of the pituitary measures {size}.
sclerosis parenchyma hippocampus side > {side} mesial temporal sclerosis.
  The {side} hippocampus is [small|atrophic] with increased T2 signal.
minor
smallvessel parenchyma white sev > {sev} chronic small vessel ischemic disease.
  There are {sev} [periventricular|patchy white matter] T2 hyperintensities.
atrophy ventricles ventricles sev > {sev} cerebral volume loss.
  The ventricles and sulci are {sevly} [prominent|enlarged] in proportion.
sinusitis sinuses sinus side > Acute {side} maxillary sinusitis.
  An air-fluid level is [present|seen] in the {side} maxillary antrum.
variant
cavum ventricles cavum > A cavum septum pellucidum is incidentally noted.
mucosa sinuses mucosa > Minimal ethmoid mucosal thickening is noted.
dva vessels dva > A developmental venous anomaly is [noted|present] in the cerebellum.
+ infarct occlusion side artery
  > Acute {infarct_side} {infarct_artery} territory infarct with arterial occlusion.

= abdomen-us | US | abdomen | Complete abdominal ultrasound | Grayscale and color Doppler images.
normal Normal abdominal ultrasound. | No acute sonographic abnormality.
why Abdominal pain. | Elevated liver enzymes. | Epigastric pain. | Jaundice. | Acute kidney injury.
ask murphy gallbladder | Right upper quadrant pain. | The sonographic Murphy sign is negative.
  | No acute cholecystitis.
ask spleen spleen | Infectious mononucleosis. | The spleen is not enlarged. | No splenomegaly.
ask portal vessels | Chronic hepatitis. | The portal vein [is patent|shows hepatopetal flow].
  | No portal vein thrombosis.
@! liver | The liver is normal in [size and echogenicity|echotexture].
  / The liver is homogeneous without a mass.
@ gallbladder | The gallbladder is [normal|unremarkable] without stones. / No gallstones or wall thickening.
@ duct | The common bile duct measures {n_duct}. / The common duct is normal at {n_duct}.
@ pancreas | The visualized pancreas is [normal|unremarkable].
@! right_kidney | The right kidney measures {n_kidney} without hydronephrosis.
  / The right kidney is normal at {n_kidney}.
  | rlength: The right kidney measures {n_kidney} in length.
@! left_kidney | The left kidney measures {n_kidney} without hydronephrosis.
  / The left kidney is normal at {n_kidney}.
  | llength: The left kidney measures {n_kidney} in length.
@ spleen | The spleen measures {n_spleen}. / The spleen is normal, {n_spleen} in length.
@ vessels | The [abdominal|visualized] aorta is normal in caliber. / The proximal aorta measures {n_aorta}.
@ peritoneum | No free fluid. / No ascites [is seen|is present].
acute
cholecystitis gallbladder gallbladder,murphy size=4..9mm
  > Acute cholecystitis. Recommend surgical consultation.
  The gallbladder wall is [thickened|edematous] to {size} with [pericholecystic fluid|a positive Murphy sign].
ductstone duct ductstone size=4..8mm > {size} choledocholithiasis. Recommend ERCP.
  A shadowing focus measuring {size} [lies within|is seen in] the common bile duct.
duct duct ductcaliber duct=9..16mm > Biliary dilatation, common duct {duct}.
  The common bile duct is [dilated|enlarged] to {duct}.
portal vessels portal > Portal vein thrombosis.
  Echogenic material [fills|expands] the main portal vein without flow.
hydro {side}_kidney hydro side sev > {sev} {side} hydronephrosis.
  There is {sev} dilatation of the {side} renal [collecting system|pelvis and calyces].
renal {side}_kidney mass side dims=1.8..6.5cm > {largest} solid {side} renal mass. Recommend CT or MRI.
  A vascular [hypoechoic|echogenic] lesion of the {side} kidney measures {dims}.
liver liver liver hepatic dims=1.5..6.5cm > {largest} {hepatic} mass. Recommend liver MRI.
  A [hypoechoic|heterogeneous] lesion measuring {dims} [lies|is seen] in the {hepatic}.
cirrhosis liver liver > Cirrhosis.
  The liver is coarse in echotexture with a [nodular|lobulated] surface.
ascites peritoneum ascites vol > {vol} volume ascites.
  A {vol} amount of anechoic fluid is [present|seen] [around the liver|in the flanks].
aaa vessels aorta size=3.1..6.5cm > {size} abdominal aortic aneurysm. {aaa}
  The [distal|infrarenal] aorta is dilated, {size} in diameter.
spleen spleen spleen size=13.2..18.5cm > Splenomegaly, {size}.
  The spleen is enlarged[, measuring| at] {size} in length.
minor
stones gallbladder gallbladder size=4..22mm > Cholelithiasis.
  [Mobile shadowing|Dependent echogenic] foci up to {size} are seen in the gallbladder lumen.
polyp gallbladder gallbladder size=3..13mm > {size} gallbladder polyp. {polyp}
  A nonmobile [echogenic|nonshadowing] focus measuring {size} adheres to the gallbladder wall.
steatosis liver liver sev > {sev} hepatic steatosis.
  The liver is {sevly} [echogenic|hyperechoic relative to the kidney].
calculus {side}_kidney calculus side pole size=3..12mm > {size} nonobstructing {side} renal stone.
  A shadowing echogenic focus in the {pole} of the {side} kidney measures {size}.
cyst {side}_kidney cyst side size=1.0..6.0cm > {size} simple {side} renal cyst.
  [An anechoic|A thin-walled anechoic] lesion of the {side} kidney measures {size}.
variant
gas pancreas gas > The pancreatic tail is obscured by [bowel|overlying] gas.
riedel liver riedel > A Riedel lobe is incidentally noted.
+ ductstone duct
  > Obstructing {ductstone_size} common duct stone with ductal dilatation to {duct_duct}. Recommend ERCP.
+ cirrhosis ascites spleen > Cirrhosis with portal hypertension and {ascites_vol} volume ascites.
+ cirrhosis portal > Cirrhosis with portal vein thrombosis.

= thyroid-us | US | thyroid | Thyroid ultrasound | Grayscale and color Doppler images of the neck.
normal Normal thyroid ultrasound. | No suspicious thyroid nodule.
why Palpable neck lump. | Hypothyroidism. | Neck fullness. | Thyroid nodule on CT.
  | Abnormal thyroid function.
ask parenchyma parenchyma | Hyperthyroidism. | Doppler flow is [normal|not increased].
  | No sign of Graves disease.
ask trachea isthmus | Stridor. | The trachea is midline and not narrowed. | No tracheal compression.
ask parathyroid parathyroid | Hypercalcemia. | No lesion is seen [deep|posterior] to the gland.
  | No parathyroid adenoma.
@! right_lobe | The right lobe measures {n_thyroid}[| and has a smooth contour].
  / The right lobe is {n_thyroid}.
  | rlength: The right lobe measures {n_goiter}.
@! left_lobe | The left lobe measures {n_thyroid}[| and has a smooth contour]. / The left lobe is {n_thyroid}.
  | llength: The left lobe measures {n_goiter}.
@! isthmus | The isthmus is {n_isthmus} [thick|in thickness]. / The isthmus measures {n_isthmus}.
@! parenchyma | The [parenchyma|gland] is homogeneous [in echotexture|with normal vascularity].
@! nodes | No [enlarged|suspicious|abnormal] cervical lymph nodes [are seen|are identified].
@ parathyroid | The strap muscles are [normal|symmetric].
  / The adjacent soft tissues are [normal|unremarkable].
acute
tr5 {side}_lobe tr5 side third size=0.6..2.8cm > {size} TI-RADS 5 {side} {third} pole nodule. {tr5}
  A [taller-than-wide hypoechoic solid|microcalcified hypoechoic solid] nodule
  & in the {third} third of the {side} lobe measures {size}.
nodes nodes nodes side station=II|III|IV|VI size=8..24mm
  > Suspicious {size} {side} level {station} lymph node.
  A rounded node without a fatty hilum at level {station} on the {side} measures {size}.
tr4 {side}_lobe tr4 side third size=0.6..2.8cm > {size} TI-RADS 4 {side} {third} pole nodule. {tr4}
  A solid hypoechoic nodule with smooth margins in the {third} third of the {side} lobe measures {size}.
tr3 {side}_lobe tr3 side third size=0.8..3.6cm > {size} TI-RADS 3 {side} {third} pole nodule. {tr3}
  A solid isoechoic nodule in the {third} third of the {side} lobe measures {size}.
thyroiditis parenchyma parenchyma > Chronic lymphocytic thyroiditis.
  The [parenchyma|gland] is diffusely heterogeneous with [increased vascularity|echogenic septations].
graves parenchyma parenchyma > Graves disease.
  The [parenchyma|gland] is hypoechoic with marked diffuse hypervascularity.
minor
tr2 {side}_lobe tr2 side third size=0.8..3.2cm > {size} TI-RADS 2 {side} {third} pole nodule.
  A mixed cystic and solid isoechoic nodule in the {third} third of the {side} lobe measures {size}.
tr1 {side}_lobe tr1 side size=0.4..2.4cm > {size} TI-RADS 1 {side} colloid cyst.
  An anechoic focus with comet-tail artifact in the {side} lobe measures {size}.
isthmus isthmus isthmus size=6..14mm > Thickened isthmus.
  The isthmus is [prominent|enlarged] at {size}.
variant
pyramid isthmus pyramid > A pyramidal lobe is incidentally noted.
reactive nodes reactive > Small cervical nodes with preserved fatty hila are noted.
+ tr5 nodes side
  > {tr5_size} TI-RADS 5 {tr5_side} {tr5_third} pole nodule with suspected level {nodes_station} metastasis.

= joint-xray | CR | joint | Radiographs of the {side} {part}
  | [Standard|Digital] radiographs of the {side} {part}.
given side part
normal No acute fracture or dislocation of the {side} {part}.
why Pain after a fall. | Sports injury. | Chronic pain. | Swelling. | Twisting injury.
ask lesion marrow | Fever and night pain. | No [bone destruction|periosteal reaction] is seen.
  | No osteomyelitis.
ask arthropathy joint_space | Suspected gout. | No juxta-articular lucency is [seen|present].
  | No erosive arthropathy.
ask foreign soft_tissues | Puncture wound. | No radiopaque [density|material] lies in the soft tissues.
  | No foreign body.
@! views | [Two|Three|Multiple] [radiographs|views] of the {side} {part} are [provided|submitted].
@! bones | The cortices are [intact|continuous][| throughout].
  / No cortical [break|step-off] is [identified|seen].
@! alignment | [Joint alignment|Alignment] is [normal|anatomic|maintained]. / The joint is congruent.
@! joint_space | The joint [space is|spaces are] [preserved|maintained]. / Articular surfaces are smooth.
@! capsule | No [joint effusion|capsular distension] is [seen|identified].
  / The joint capsule is not distended.
@! marrow | Bone mineralization is normal. / No [lytic or sclerotic|focal] bone lesion is [seen|present].
@ soft_tissues | The [surrounding|periarticular] soft tissues are [unremarkable|normal].
acute
dislocation alignment,joint_space alignment dir > {dir} {side} {part} dislocation. Recommend prompt reduction.
  The articular surfaces have lost contact, the distal bone displaced {dirly}.
displaced bones fracture bone pattern=transverse|oblique|comminuted size=2..14mm
  > {pattern} fracture of the {side} {bone} with {size} displacement. Recommend orthopedic consultation.
  / A {pattern} break [crosses|traverses] the {bone}, the fragments separated by {size}.
nondisplaced bones fracture bone pattern=transverse|oblique|longitudinal
  > Nondisplaced {pattern} fracture of the {side} {bone}.
  [A thin|A faint] {pattern} lucent line [crosses|traverses] the {bone} without step-off.
lesion marrow lesion bone dims=0.8..2.9cm > {largest} aggressive lesion of the {side} {bone}. Recommend MRI.
  A [permeative|moth-eaten] lucency with a wide transition zone in the {bone} measures {dims}.
osteomyelitis marrow lesion bone > Osteomyelitis of the {side} {bone}.
  [Cortical erosion|Bone destruction] and periosteal reaction are present at the {bone}.
foreign soft_tissues foreign size=2..18mm > {size} radiopaque foreign body in the soft tissues.
  A [linear|angular] metallic density measuring {size} is embedded beneath the skin.
gout joint_space arthropathy > Gouty arthropathy.
  [Juxta-articular|Marginal] erosions with overhanging edges are [present|seen].
effusion capsule effusion vol > {vol} {side} {part} effusion.
  The [capsule|joint capsule] is distended by a {vol} amount of fluid.
minor
arthritis joint_space arthropathy sev > {sev} osteoarthritis of the {side} {part}.
  There is {sev} joint space narrowing with [osteophytes|subchondral sclerosis].
cppd capsule cppd > Chondrocalcinosis.
  [Linear|Punctate] calcification is [seen|present] within the articular cartilage.
loose capsule loose size=4..14mm > {size} intra-articular loose body.
  A [smooth|corticated] ossific density within the joint measures {size}.
osteopenia marrow density > Osteopenia.
  The bones are [diffusely|] demineralized.
variant
swelling soft_tissues swelling > Mild soft tissue swelling is noted.
enthesophyte bones enthesophyte > A small enthesophyte is [incidentally|] noted.
island marrow island > A [tiny|small] bone island is incidentally noted.
+ nondisplaced effusion
  > Nondisplaced {nondisplaced_pattern} fracture of the {side} {nondisplaced_bone}
  & with {effusion_vol} hemarthrosis.
+ displaced effusion
  > {displaced_pattern} fracture of the {side} {displaced_bone} with {displaced_size} displacement
  & and {effusion_vol} hemarthrosis. Recommend orthopedic consultation.
+ displaced dislocation
  > {dislocation_dir} {side} {part} fracture-dislocation involving the {displaced_bone}.
  & Recommend prompt reduction.

= mammogram | MG | breast | Diagnostic mammogram, bilateral | Craniocaudal and mediolateral oblique views.
given density
normal No mammographic evidence of malignancy.
why Palpable lump. | Recall from screening. | Focal breast pain. | Family history of breast cancer.
ask skin skin | Breast redness. | The dermis is [not thickened|of normal thickness].
  | No sign of inflammatory cancer.
ask nipple nipples | Nipple discharge. | No [dilated duct|retroareolar lesion] is [seen|identified].
  | No suspicious duct.
@! density | The breasts are {density}. / Breast tissue is {density}.
@! masses | No [suspicious|dominant|spiculated] mass [is seen|is identified] in either breast.
@! calcifications | No suspicious [microcalcifications|calcifications] [are seen|are identified].
@! architecture | No [area of|] architectural distortion [is seen|is identified].
  / The parenchymal pattern is undisturbed.
@! axillae | The axillae are [unremarkable|clear]. / No axillary adenopathy.
@ skin | The skin is [normal|unremarkable]. / There is no skin retraction.
@ nipples | The nipples are in profile.
acute
cancer masses mass side quad depth size=6..38mm birads=5
  > {size} spiculated {side} breast mass, {quad}, {depth} depth. Recommend ultrasound-guided biopsy.
  / In the {depth} third of the {side} {quad}, an irregular density with radiating margins measures {size}.
pleomorphic calcifications calcium side quad size=8..49mm birads=4
  > {size} group of suspicious {side} breast calcifications, {quad}. Recommend stereotactic biopsy.
  / Fine pleomorphic [particles|specks] span {size} in the {side} {quad}.
distortion architecture distortion side quad birads=4
  > Architectural distortion in the {side} breast, {quad}. Recommend tomosynthesis-guided biopsy.
  / [Radiating|Tethered] lines without a central mass are seen in the {side} {quad}.
node axillae node side size=12..29mm birads=4 > {size} suspicious {side} axillary lymph node.
  A dense rounded node in the {side} axilla measures {size}[| without a fatty hilum].
skin skin skin side size=3..8mm birads=4 > {side} breast skin thickening to {size}. Recommend punch biopsy.
  The dermis of the {side} breast is [edematous|thick], measuring {size}.
oval masses oval side quad depth size=5..24mm birads=3
  > {size} probably benign {side} breast mass, {quad}, {depth} depth. Recommend six-month follow-up.
  / In the {depth} third of the {side} {quad}, an oval circumscribed density measures {size}.
asymmetry architecture asymmetry side quad birads=3
  > Focal asymmetry in the {side} breast, {quad}. Recommend six-month follow-up.
  / Tissue is [denser|more prominent] in the {side} {quad}, seen on two views.
minor
fibroadenoma masses coarse side size=6..26mm birads=2 > {size} calcified {side} fibroadenoma.
  A [mass|density] with popcorn calcifications in the {side} breast measures {size}.
hamartoma masses hamartoma side size=15..60mm birads=2 > {size} {side} breast hamartoma.
  An encapsulated mass of mixed fat and glandular density in the {side} breast measures {size}.
oil calcifications oil side birads=2 > {side} breast oil cyst.
  A rim-calcified lucent [lesion|nodule] is present in the {side} breast.
vascular calcifications vascular birads=2 > Vascular calcifications.
  Parallel tram-track [densities|calcifications] [follow|line] the arteries.
variant
mole skin mole > A skin marker denotes a mole.
+ cancer node side
  > {cancer_size} {cancer_side} breast mass, {cancer_quad}, with suspected axillary metastasis.
  & Recommend biopsy.
"""


@dataclass(frozen=True, slots=True)
class Phrase:
    form: str
    names: tuple[str, ...]  # the placeholders in it


@dataclass(frozen=True, slots=True)
class Finding:
    key: str
    rank: int  # 0: the most important of the exam
    level: str  # "acute", "minor" or "variant"
    regions: tuple[str, ...]
    slots: tuple[str, ...]
    draws: tuple[tuple[str, tuple[str, ...]], ...]  # attribute, values (none: see BY_PART)
    impression: tuple[Phrase, ...]  # one, or none of a variant
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True, slots=True)
class Region:
    name: str
    required: bool
    clear: tuple[Phrase, ...]
    rest: tuple[tuple[str, tuple[Phrase, ...]], ...]


@dataclass(frozen=True, slots=True)
class Ask:
    slot: str
    region: str
    indication: str
    phrases: tuple[Phrase, ...]
    impression: str


@dataclass(frozen=True, slots=True)
class Combination:
    keys: tuple[str, ...]
    shared: tuple[str, ...]
    impression: Phrase


@dataclass(slots=True)
class Exam:
    key: str
    modality: str
    body_part: str
    title: str
    techniques: tuple[Phrase, ...]
    normal: tuple[str, str] = ("", "")
    given: tuple[str, ...] = ()
    indications: tuple[str, ...] = ()
    asks: list[Ask] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    levels: dict[str, list[Finding]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    combinations: list[Combination] = field(default_factory=list)
    held_out: list[tuple[str, str]] = field(default_factory=list)  # the more important key first


@dataclass(frozen=True, slots=True)
class Report:
    """`statements` are the impression's, `positives` the keys of the findings in it; both by importance."""

    exam: str
    modality: str
    body_part: str
    title: str
    technique: str
    indication: str
    findings: str
    statements: tuple[str, ...]
    closing: str
    positives: tuple[str, ...]
    reserved: bool  # holds an attribute combination that is reserved for test

    @property
    def impression(self) -> str:
        return " ".join(number(self.statements) + ([self.closing] if self.closing else []))


def number(statements: Sequence[str]) -> list[str]:
    if len(statements) == 1:
        return list(statements)
    return [f"{index}. {statement}" for index, statement in enumerate(statements, 1)]


def pick(rng: Random, items: Sequence[T]) -> T:
    # Only random() keeps its sequence for a seed in every Python version.
    return items[int(rng.random() * len(items))]


def values(name: str, source: str) -> tuple[str, ...]:
    """The values that `source` stands for: "right|left" or a range such as "3..12mm"."""
    span = re.fullmatch(r"([\d.]+?)\.\.([\d.]+)(mm|cm)", source)
    if span is None:
        return tuple(value.replace("_", " ") for value in source.split("|"))
    scale = 1 if span[3] == "mm" else 10
    sizes = range(round(float(span[1]) * scale), round(float(span[2]) * scale) + 1)
    digits = 0 if scale == 1 else 1
    if name == "dims":
        pairs = ((size / scale, size * ratio / scale) for size in sizes for ratio in (0.6, 0.75, 0.9))
        return tuple(f"{one:.1f} x {two:.1f} cm" for one, two in pairs)
    return tuple(f"{size / scale:.{digits}f} {span[3]}" for size in sizes)


def expand(*sources: str) -> tuple[Phrase, ...]:
    """Every choice of the alternatives "[a|b]" in the sources."""
    forms = []
    for source in sources:
        pieces = re.split(r"\[([^\]]*)\]", source.strip())
        options = [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]
        forms += [" ".join("".join(choice).split()) for choice in itertools.product(*options)]
    return tuple(Phrase(form, tuple(re.findall(r"{(\w+)}", form))) for form in forms)


def fraction(text: str) -> float:
    """A hash of the text in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32


def parse_exam(block: str) -> Exam:
    """One block of CONTENT, whose grammar stands above it."""
    lines = re.sub(r"\n  (?:& |(?=[|>/]))", " ", block)
    lines = lines.replace("\n  ", " / ")
    heading, *rest = lines.strip().splitlines()
    key, modality, body_part, title, technique = heading.split(" | ")
    exam, level = Exam(key, modality, body_part, title, expand(technique)), ""
    for line in rest:
        head, _, tail = line.partition(" ")
        if head in LEVELS:
            level = head
        elif head == "normal":
            normal = tail.split(" | ")
            exam.normal = (normal[0], normal[-1])
        elif head == "given":
            exam.given = tuple(tail.split())
        elif head == "why":
            exam.indications = tuple(tail.split(" | "))
        elif head == "ask":
            place, indication, says, means = tail.split(" | ")
            slot, region = place.split()
            exam.asks.append(Ask(slot, region, indication, expand(*says.split(" / ")), means))
        elif head in ("@", "@!"):
            name, clear, *others = tail.split(" | ")
            pairs = (other.split(": ", 1) for other in others)
            exam.regions.append(
                Region(
                    name,
                    head == "@!",
                    expand(*clear.split(" / ")),
                    tuple((slot, expand(*says.split(" / "))) for slot, says in pairs),
                )
            )
        elif head == "+":
            place, means = tail.split(" > ")
            names = place.split()
            keys = tuple(name for name in names if name in exam.findings)
            exam.combinations.append(Combination(keys, tuple(names[len(keys) :]), expand(means)[0]))
        else:
            finding = parse_finding(line, level, len(exam.findings))
            exam.findings[finding.key] = finding
            exam.levels[level].append(finding)
    joined = {pair for rule in exam.combinations for pair in itertools.permutations(rule.keys, 2)}
    positives = exam.levels["acute"] + exam.levels["minor"]
    exam.held_out = [
        (first.key, second.key)
        for first, second in itertools.combinations(positives, 2)
        if not set(first.slots) & set(second.slots)
        and (first.key, second.key) not in joined
        and fraction(f"{key} {first.key} {second.key}") < 1 / 6
    ]
    return exam


def parse_finding(line: str, level: str, rank: int) -> Finding:
    place, _, rest = line.partition(" > ")
    key, regions, slots, *attributes = place.split()
    means, *says = rest.split(" / ")
    if level == "variant":
        means, says = "", [means, *says]
    draws = []
    for attribute in attributes:
        name, _, source = attribute.partition("=")
        draws.append((name, values(name, source) if source else POOL.get(name, ())))
    return Finding(
        key,
        rank,
        level,
        tuple(regions.split(",")),
        tuple(slots.split(",")),
        tuple(draws),
        expand(means) if means else (),
        expand(*says),
    )


POOL = {name: values(name, source) for name, source in re.findall(r"(\w+)=(.+)", POOLS)}
EXAMS = {exam.key: exam for exam in (parse_exam(block) for block in CONTENT.split("\n= ")[1:])}


@functools.cache
def is_reserved(exam: str, finding: str, attributes: tuple[str, ...]) -> bool:
    return fraction(f"{exam} {finding} {' '.join(attributes)}") < 1 / 6


def can_be_reserved(finding: Finding) -> bool:
    choices = 1
    for name, pool in finding.draws:
        choices *= len(pool) or (4 if name == "bone" else 2)
    return choices >= 12


def article(text: str) -> str:
    """ "a 8 mm" -> "an 8 mm", and a capital first letter."""
    text = re.sub(r"\b([Aa]) (?=8|1[18]\b|[aeio]|u(?!ni|te|re))", r"\1n ", text)
    return text[0].upper() + text[1:]


def value(attributes: Attributes, name: str) -> str:
    """A drawn attribute, or one that follows from a drawn one."""
    if name in attributes:
        return attributes[name]
    source, rule = DERIVED[name]
    return rule(attributes[source])


def say(rng: Random, phrases: Sequence[Phrase], attributes: Attributes) -> str:
    phrase = pick(rng, phrases)
    if not phrase.names:
        return phrase.form
    fields = {
        name: pick(rng, POOL[name]) if name.startswith("n_") else value(attributes, name) for name in phrase.names
    }
    return article(phrase.form.format_map(fields))


def choose(rng: Random, exam: Exam, count: int, held_out: bool) -> tuple[list[Finding], tuple[str, ...]]:
    """Up to `count` findings that can occur together, and the attributes that they share."""
    chosen: list[Finding] = []
    shared: tuple[str, ...] = ()
    if held_out and count > 1:
        chosen = [exam.findings[key] for key in pick(rng, exam.held_out)]
    elif held_out and count == 1 and rng.random() < 0.8:
        chosen = [pick(rng, [f for f in exam.levels["acute"] + exam.levels["minor"] if can_be_reserved(f)])]
    elif exam.combinations and count > 1 and rng.random() < 0.3:
        combination = pick(rng, exam.combinations)
        if len(combination.keys) <= count:
            chosen, shared = [exam.findings[key] for key in combination.keys], combination.shared
    for _ in range(40):
        if len(chosen) >= count:
            break
        finding = pick(rng, exam.levels["acute" if rng.random() < 0.65 else "minor"])
        if not any(clash(exam, finding, other, held_out) for other in chosen):
            chosen.append(finding)
    return chosen, shared


def clash(exam: Exam, one: Finding, other: Finding, held_out: bool) -> bool:
    if any(slot in other.slots for slot in one.slots):
        return True
    pair = (one.key, other.key) if one.rank < other.rank else (other.key, one.key)
    return not held_out and pair in exam.held_out


def draw(
    rng: Random, exam: Exam, finding: Finding, given: Attributes, forced: Attributes, reserved: bool | None
) -> tuple[Attributes, bool]:
    """Attributes of a finding, and whether they are reserved for test (`reserved` None: either will do)."""
    limited = can_be_reserved(finding)
    for _ in range(1000):
        attributes = dict(given)
        for name, pool in finding.draws:
            pool = pool or BY_PART[given["part"]].get(name, DIRECTIONS)
            attributes[name] = forced.get(name) or pick(rng, pool)
        own = tuple(attributes[name] for name, _ in finding.draws)
        held = limited and is_reserved(exam.key, finding.key, own)
        if reserved is None or not limited or held == reserved:
            return attributes, held
    raise AssertionError(f"{exam.key} {finding.key}: no attribute combination with reserved={reserved}")


def make_report(
    rng: Random, exam_key: str | None = None, *, positives: int | None = None, held_out: bool = False
) -> Report:
    """One report of an exam (a key of EXAMS) with up to `positives` findings; by chance where not given.

    With `held_out` it is one for the test split, without it one that may be trained on (rules 2 and 3 above).
    """
    exam = EXAMS[exam_key] if exam_key else pick(rng, tuple(EXAMS.values()))
    count = pick_share(rng, POSITIVE_SHARES) if positives is None else positives
    given = {name: pick(rng, POOL[name]) for name in exam.given}
    chosen, shared = choose(rng, exam, count, held_out)
    want = (len(chosen) == 1 or None) if held_out else False
    forced: Attributes = {}
    drawn: dict[str, Attributes] = {}
    reserved = False
    for finding in chosen:
        drawn[finding.key], held = draw(rng, exam, finding, given, forced, want)
        reserved = reserved or held
        if shared and not forced:
            forced = {name: value(drawn[finding.key], name) for name in shared}
    for _ in range(pick_share(rng, (0.6, 0.3, 0.1))):
        variant = pick(rng, exam.levels["variant"])
        if not any(clash(exam, variant, other, True) for other in chosen):
            chosen.append(variant)
            drawn[variant.key] = given
    asks = sorted({int(rng.random() * len(exam.asks)) for _ in range(pick_share(rng, (0.35, 0.4, 0.25)))})
    indication = " ".join(exam.asks[index].indication for index in asks) or pick(rng, exam.indications)
    taken = {slot for finding in chosen for slot in finding.slots}
    # A question whose answer is a positive finding gets no negative statement.
    answered = [exam.asks[index] for index in asks if exam.asks[index].slot not in taken]
    text = ""
    while len(text.split()) < MIN_WORDS:
        text = narrate(rng, exam, chosen, drawn, given, answered)
    ranked = sorted(chosen, key=lambda finding: finding.rank)
    positive = {finding.key: drawn[finding.key] for finding in ranked if finding.impression}
    return Report(
        exam.key,
        exam.modality,
        exam.body_part.format_map(given),
        exam.title.format_map(given),
        say(rng, exam.techniques, given),
        indication,
        text,
        impress(exam, positive, given, answered),
        close(exam, positive, given),
        tuple(positive),
        reserved,
    )


def pick_share(rng: Random, shares: Sequence[float]) -> int:
    draw = rng.random()
    for index, share in enumerate(shares):
        draw -= share
        if draw < 0:
            return index
    return len(shares) - 1


def impress(exam: Exam, positive: dict[str, Attributes], given: Attributes, asks: Sequence[Ask]) -> tuple[str, ...]:
    """The statements of the impression. `positive` holds the findings in order of importance."""
    ranked: list[tuple[int, str]] = []
    left = dict(positive)
    for combination in exam.combinations:
        keys = combination.keys
        if any(key not in left for key in keys):
            continue
        if any(len({value(left[key], name) for key in keys}) > 1 for name in combination.shared):
            continue
        fields = dict(given)
        for name in combination.impression.names:
            key, _, attribute = name.partition("_")
            if key in left:
                fields[name] = value(left[key], attribute)
        ranked.append((exam.findings[keys[0]].rank, article(combination.impression.form.format_map(fields))))
        left = {key: attributes for key, attributes in left.items() if key not in keys}
    for key, attributes in left.items():
        phrase = exam.findings[key].impression[0]
        fields = {name: value(attributes, name) for name in phrase.names}
        ranked.append((exam.findings[key].rank, article(phrase.form.format_map(fields))))
    ranked.sort()
    acute = bool(positive) and exam.findings[next(iter(positive))].level == "acute"
    if acute:
        return tuple(text for _, text in ranked)
    opening = exam.normal[1 if positive else 0].format_map(given)
    return (" ".join([opening, *(ask.impression for ask in asks)]), *(text for _, text in ranked))


def close(exam: Exam, positive: dict[str, Attributes], given: Attributes) -> str:
    """The BI-RADS category of a mammogram: the highest of its findings."""
    if exam.modality != "MG":
        return ""
    category = max((attributes["birads"] for attributes in positive.values()), default="1")
    dense = category in "12" and given["density"].endswith(" dense")
    advice = " Consider supplemental screening." if dense else ""
    return f"BI-RADS {category}: {BIRADS[category]}.{advice}"


def narrate(
    rng: Random,
    exam: Exam,
    chosen: Sequence[Finding],
    drawn: dict[str, Attributes],
    given: Attributes,
    asks: Sequence[Ask],
) -> str:
    """The findings text: a walk through the regions, most of them normal."""
    spoken: dict[str, list[str]] = {}
    silent: set[str] = set()
    taken = {slot for finding in chosen for slot in finding.slots} | {ask.slot for ask in asks}
    for finding in chosen:
        regions = [region.format_map(drawn[finding.key]) for region in finding.regions]
        spoken.setdefault(regions[0], []).append(say(rng, finding.phrases, drawn[finding.key]))
        silent.update(regions)
    pieces: list[tuple[str, str, int]] = []  # region, sentence, how readily it is left out
    for region in in_order(rng, exam.regions, spoken):
        pieces += [(region.name, sentence, 0) for sentence in spoken.get(region.name, ())]
        if region.name in silent:
            pieces += [
                (region.name, say(rng, phrases, given), 2)
                for slot, phrases in region.rest
                if slot not in taken and rng.random() < 0.7
            ]
        elif region.required or rng.random() < 0.9:
            stated = any(name in given for name in region.clear[0].names)
            ease = 0 if stated else 1 if region.required else 2
            pieces.append((region.name, say(rng, region.clear, given), ease))
        here = (ask for ask in asks if ask.region == region.name)
        pieces += [(region.name, say(rng, ask.phrases, given), 0) for ask in here]
    return assemble(rng, shorten(rng, pieces))


def in_order(rng: Random, regions: Sequence[Region], spoken: dict[str, list[str]]) -> list[Region]:
    """The usual order with some neighbours exchanged, or positives first; the first region stays first."""
    first, *rest = regions
    for index in range(1, len(rest)):
        if rng.random() < 0.2:
            rest[index - 1], rest[index] = rest[index], rest[index - 1]
    if rng.random() < 0.2:
        rest.sort(key=lambda region: region.name not in spoken)
    return [first, *rest]


def shorten(rng: Random, pieces: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Leave out normal statements at random down to a random length, required ones only above MAX_WORDS."""
    words = sum(len(sentence.split()) + 1 for _, sentence, _ in pieces)
    aim = 60 + int(rng.random() * (MAX_WORDS - 60))
    for ease, limit in ((2, aim), (1, MAX_WORDS)):
        while words > limit:
            open_to = [index for index, piece in enumerate(pieces) if piece[2] == ease]
            if not open_to:
                break
            words -= len(pieces.pop(pick(rng, open_to))[1].split()) + 1
    return pieces


def assemble(rng: Random, pieces: Iterable[tuple[str, str, int]]) -> str:
    """One paragraph, or with the name of each region before its statements."""
    if rng.random() > 0.15:
        return " ".join(sentence for _, sentence, _ in pieces)
    parts = []
    for name, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        label = name.replace("_", " ").capitalize()
        parts.append(f"{label}: " + " ".join(sentence for _, sentence, _ in group))
    return " ".join(parts)


HEADINGS = (
    ("EXAM", "INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("EXAMINATION", "HISTORY", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("EXAM", "CLINICAL INDICATION", "TECHNIQUE", "COMPARISON", "FINDINGS", "IMPRESSION"),
    ("PROCEDURE", "REASON FOR EXAM", "TECHNIQUE", "COMPARISON", "FINDINGS", "CONCLUSION"),
)


def as_text(rng: Random, report: Report) -> str:
    """The whole report as plain text in one of many layouts."""
    exam, reason, technique, comparison, findings, impression = pick(rng, HEADINGS)
    lined = rng.random() < 0.4  # numbered statements on lines of their own
    statements = number(report.statements) + ([report.closing] if report.closing else [])
    sections = [(exam, f"{report.title}."), (reason, report.indication)]
    if rng.random() < 0.6:
        sections.append((technique, report.technique))
    if rng.random() < 0.4:
        sections.append((comparison, "None."))
    if rng.random() < 0.3:
        sections = []
    sections += [(findings, report.findings), (impression, ("\n" if lined else " ").join(statements))]
    upper, below, gap = rng.random() < 0.5, rng.random() < 0.25, "\n\n" if rng.random() < 0.3 else "\n"
    shown = []
    for name, body in sections:
        heading = name if upper else name.capitalize()
        shown.append(f"{heading}:" + ("\n" if below or "\n" in body else " ") + body)
    return gap.join(shown)


def normalise(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9.]+", text.lower()))


def make_split(name: str, seen: set[str]) -> list[dict[str, str]]:
    """The rows of a split; adds their normalised findings to `seen` and avoids those in it."""
    rng = Random(f"{SEED} {name}")
    rows: list[dict[str, str]] = []
    patients, exams = 0, tuple(EXAMS)
    while len(rows) < COUNTS[name]:
        report = make_report(rng, exams[len(rows) % len(exams)], held_out=name == "test")
        key = normalise(report.findings)
        if key in seen:
            continue
        seen.add(key)
        patients += rng.random() < 0.85 or not rows  # some patients have two or three exams
        day = datetime.date(2015, 1, 1) + datetime.timedelta(days=int(rng.random() * 3650))
        rows.append(
            {
                "id": f"syn-{name}-{len(rows) + 1:06d}",
                "findings": report.findings,
                "impression": report.impression,
                "patient_id": f"syn-{name}-p{patients:05d}",
                "study_date": day.isoformat(),
                "modality": report.modality,
                "body_part": report.body_part,
                "indication": report.indication,
            }
        )
    return rows


def make_splits() -> dict[str, list[dict[str, str]]]:
    seen: set[str] = set()
    return {name: make_split(name, seen) for name in COUNTS}


def make_texts(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Whole reports for pre-training, none with the findings of a validation or test report."""
    kept_apart: set[str] = set()
    for name in ("test", "validation"):
        make_split(name, kept_apart)
    rng = Random(f"{SEED} text {seed}")
    made = 0
    while made < count:
        report = make_report(rng)
        if normalise(report.findings) not in kept_apart:
            made += 1
            yield {"id": f"syn-text-{seed}-{made:06d}", "text": as_text(rng, report)}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines, written beside `path` and renamed once whole."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the synthetic radiology corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="write train.jsonl, validation.jsonl and test.jsonl")
    pairs.add_argument("--out", type=Path, required=True, help="folder")
    text = commands.add_parser("text", help="write whole reports as plain text, for pre-training")
    text.add_argument("--count", type=natural, default=40_000)
    text.add_argument("--seed", type=natural, default=1)
    text.add_argument("--output", type=Path, required=True, help="JSON lines file")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pairs":
            for name, rows in make_splits().items():
                write_rows(options.out / f"{name}.jsonl", rows)
        else:
            write_rows(options.output, make_texts(options.count, options.seed))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: cannot write: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
