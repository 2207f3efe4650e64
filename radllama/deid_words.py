"""Word lists and labels of the identifier screen: data only, no rules (those are in deid_rules.py)."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Common given names; those that are also words of a report (Mark, Grant, Ray, May, Grace, ...) are left out.
FIRST = _words("""
aaron abigail adam adriana ahmed aisha alan albert alejandro alex alexander alexandra alexis alfred ali alice alicia
alison allison amanda amber amelia amy ana andrea andrew andy angela angelica anita ann anna anne anthony antonio
arthur ashley barbara beatrice benjamin bernard beth betty beverly bob bonnie bradley brandon brenda brian brittany
bruce bryan caleb cameron camille carl carla carlos carmen carol caroline carolyn catherine cecilia charles charlotte
cheryl christina christine christopher cindy claire clara claudia colin connie craig cristina crystal curtis cynthia
daniel daniela danielle danny darren david deborah debra denise dennis derek diana diane diego dmitri dominic donald
donna doris dorothy douglas duncan dylan earl eduardo edward edwin eileen elaine eleanor elena elizabeth ellen emily
emma enrique eric erica erik erin ernest esther ethan eugene eva evelyn fatima felipe fernando fiona frances francesca
francis francisco franklin frederick gabriel gabriela gary george gerald gina giovanni giulia gloria gonzalo gordon
greg gregory guillermo gustavo hannah hans harold harry hassan heather hector heidi helen henry herbert howard hugo ian
ibrahim inez irene isaac isabel isabella jack jacob jacqueline jaime james jamie jane janet janice jared jasmine jason
javier jeffrey jenna jennifer jeremy jerome jerry jesse jessica jill jim jimmy joan joanna joe joel johan john johnny
jonathan jordan jorge jose joseph josephine joshua joyce juan juanita judith judy julia julian julie julio justin karen
karl katherine kathleen kathryn kathy katie keith kelly kelsey kenneth kevin kimberly kristen kristin kyle larry laura
lauren laurie lawrence leonard leonardo leslie liam linda lindsay lisa logan lois lorenzo lori louis louise lucas lucia
lucy luigi luis luke lydia lynn madeline madison manuel marcus margaret maria mariana marie marilyn mario marion
marjorie marlene martha martin martina marvin mary mateo matthew maureen maurice megan melanie melinda melissa mia
michael michele michelle miguel mike mildred mohamed mohammed monica morgan muhammad nancy natalia natalie nathan
nathaniel neil nicholas nicole nina noah nora oliver olivia omar oscar pablo pamela patricia patrick paul paula pauline
pedro peter philip phillip phyllis pierre priya rachel rafael raj ralph ramon randall randy raul raymond rebecca regina
renee ricardo richard rita robert roberto robin rodney roger roland ronald rosa rosemary roy ruben russell ruth ryan
sally samantha samuel sandra sanjay sara sarah scott sean sebastian sergio shannon sharon shawn sheila shirley simon
sofia sonia sophia sophie stacy stanley stefan stephanie stephen steve steven sunil susan suzanne sylvia tamara tammy
tanya tara teresa terrence terry theodore theresa thomas tiffany timothy tina todd tracy travis tyler valerie vanessa
veronica vicki victor victoria vijay vincent vivian walter wanda warren wayne wendy wesley william wolfgang yolanda
yvonne zachary zoe
""")
LAST = _words("""
adams aguilar ahmed alexander ali allen alvarez anderson andrews armstrong arnold bailey baker banks barnes barnett
bell bennett berry bishop black boyd bradley brooks brown bryant burke burns burton butler campbell carlson carpenter
carroll carter castillo castro chan chang chapman chavez chen choi clark cohen cole coleman collins cook cooper cox
crawford cruz cunningham daniels davis delgado diaz dixon douglas duncan dunn edwards elliott ellis estrada evans
ferguson fernandez fisher fleming flores ford foster fowler fox franklin freeman fuller garcia gardner garza gibson
gilbert gomez gonzales gonzalez gordon graham grant gray green greene griffin guerrero gupta gutierrez guzman hall
hamilton hansen hanson harper harris harrison hart harvey hawkins hayes henderson henry hernandez herrera hicks hill
hoang hoffman holland holmes howard howell huang hudson hughes hunt hunter hussain huynh ibrahim jackson jacobs james
jenkins jensen jimenez johnson johnston jones jordan kaur keller kelley kelly kennedy khan kim king klein knight kumar
lambert larson lawrence lawson le lee lewis li lin little liu long lopez lynch marquez marshall martin martinez mason
matthews may mccarthy mccoy mcdonald medina mehta mejia mendez mendoza meyer miller mills mitchell mohamed molina
montgomery moore morales moreno morgan morris morrison munoz murphy murray myers nelson newman ngo nguyen nichols
norris nunez obrien oconnor oliver olson ortega ortiz owens palmer park parker patel patterson payne perez perkins
perry peters peterson pham phillips pierce porter powell price ramirez ramos reed reid reyes reynolds rice richards
richardson riley rios rivera roberts robertson robinson rodriguez rogers romero rose ross ruiz russell ryan salazar
sanchez sanders sandoval santiago santos schmidt schneider schultz scott sharma shaw silva simmons simpson singh smith
snyder soto spencer stephens stevens stewart stone sullivan tanaka taylor thomas thompson torres tran tucker turner
valdez vargas vasquez vazquez vega wagner walker wallace walsh wang ward warren washington watkins watson weaver webb
weber weiss wells west wheeler white williams williamson willis wilson wong wood woods wright wu yang young zhang zhou
""")
# Words in a name's place that are none: function words, roles, departments, anatomy, devices, headings, units.
STOP = _words("""
a abdomen abdominal able abnormal about above accession account acute addendum admitting after again age ago agrees all
also am an and anesthesia anesthesiologist anesthesiology ankle anterior any aorta aortic appendix approved april are
arm artery as assessed assistant at atelectasis attending august aware axial back balloon be been before below between
bilateral bladder body bone bones both bowel brain breast bronchus but by called came can cannot cardiac cardiologist
cardiology cardiomegaly care category catheter cc central cervical chamber change changes charge chest cholelithiasis
class classification clavicle clinic clinical clinician clip cm code coil colon comparison complete concurs confirmed
consistent consolidation consultant consulted contacted contrast coordinator cord coronal coronary could covering
criteria critical crna ct cta cyst date dated day days dds december declined decreased degenerative denied denies
department dermatology described dictated did diffuse disc discharged discussed disease disorder distal diverticulosis
dmd dnp do dob doctor does done doppler double dpm dr drain duct due during each ed edema effusion either elbow
emergency emphysema endocrinology entire er esophagus esq evaluation exam examination examined exams except faan facr
family fax february fell fellow femur fibula film films filter final findings finger floor fluoroscopy focal foot for
forearm found fracture frank frcpc frcr french friday from frontal full further gallbladder gastroenterology gauge gave
gender general gi gland grade graft granuloma gross group guidelines gyn gynecology had hand hardware has have he head
heart height hematology hemorrhage hepatic her here hernia him hip his history hospital hospitalist hours house how hrs
humerus hydronephrosis i icu id if ii iii iliac image images imaging impression in incomplete increased indicated
indication infarct infectious inferior informed injury inpatient interpreted interval interventional intestine involved
is ischemia it its iv january joint jr july june kidney kidneys knee large last later lateral lead left lesion less
level ligament likely limited line liver lobe lower lpn lumbar lung lungs lymph mammogram mammography mandible maneuver
march markedly mass may mbbs mbchb md me medial mediastinum medical medicine medstudent meniscus mesh method micu mild
minimal ml mm moderate monday more most mpas mr mra mri mrn ms multiple muscle must my name neck needle negative
neither nerve neurology neurosurgery new next nicu no node nodule none nor normal normal-sized not note notes notified
november now np number nurse nurses nursing oblique obstetrics obtained october of off office old on on-call oncology
one only opacities opacity operating ophthalmology or orbit ordered ordering orthopaedics orthopedic orthopedics
osteoarthritis osteopenia other otolaryngology our out outpatient outside ovary over pa pa-c pacs page paged pager
pancreas parents partial patchy pathology patient pcp pediatric pediatrics pelvic pelvis pending per performed
peripheral personally pet ph pharmd phd phone phoned physician physicians picu placed please pleural pm pneumonia
pneumothorax port portable position positive possible posterior practitioner present presented presents previous
primary prior probable procedure procedures projection prostate prosthesis protocol provided provider providers
proximal psychiatry pulmonary pulmonology pump race rad radiograph radiographer radiographs radiologist radiologists
radiology radius rdms re read reason recommend recommended rectum referred referring registrar rehabilitation relayed
renal reported requested requesting resident residents respiratory result results reviewed rheumatology rib ribs right
rn rrt rt rvt sacrum sagittal said same saturday scale scan scanned scapula scarring scheduled scoliosis score screw
seen segment september sequence series service severe sex she sheath should shoulder shunt sicu sign signed since
single sinus skull slight small so social some sonographer sonography specialist spine spleen splenic spondylosis sr
ssn stable staff stage staples stated states status stenosis stent sternum stomach student study subsequent such sunday
superior supervising surgeon surgeons surgery surgical suspected sutures syndrome team technician technique
technologist tel telephone temporal tendon test testis than that the their them then therapist therapy there these they
thigh this thoracic thorax those three through thursday thus thyroid tibia time to today toe together told tolerated
total trachea transcribed transplant trauma tube tuesday tumor two type ulna ultrasound unable unchanged under
underwent unit unknown until up upon upper ureter urinary urology us uterus valve vascular vein vena ventricle verified
vertebra vertebral very via view views wall ward was we wednesday weight were what when where which while who whose
will wire with within without would wrist x-ray xray year years yes yesterday you your zip
""")
CITIES = _words("""
albany albuquerque anchorage arlington atlanta austin bakersfield baltimore boise boston bridgeport brockton brooklyn
buffalo burlington cambridge charlotte chattanooga chicago cincinnati cleveland columbus concord dallas dayton denver
detroit durham edinburgh fresno glasgow greensboro hartford honolulu houston indianapolis jacksonville knoxville
lancaster lexington liverpool london louisville lowell lynn madison manchester memphis mesa miami milwaukee minneapolis
mobile montreal nashville newark norfolk oakland oklahoma omaha orlando oxford paris philadelphia phoenix pittsburgh
plymouth portland providence quincy raleigh reno richmond rochester sacramento salem savannah scottsdale seattle
shreveport somerville spokane springfield stamford syracuse tacoma tampa toledo toronto tucson tulsa vancouver waltham
wichita worcester
""")
STREETS = _words("""
alley annex arcade ave avenue bayou beach bend bluff bluffs blvd bottom boulevard branch bridge brook brooks burg burgs
bypass camp canyon cape causeway center centers circle circles cliff cliffs club common corner corners course court
courts cove coves creek crescent crest crossing crossroad crossroads curve dale dam divide dr drive drives estate
estates expressway extension extensions fall falls ferry field fields flat flats ford fords forest forge forges fork
forks fort freeway garden gardens gateway glen glens green greens grove groves harbor harbors haven heights highway
hill hills hollow inlet island islands isle junction junctions key keys knoll knolls lake lakes land landing lane light
lights ln loaf lock locks lodge loop mall manor manors meadow meadows mews mill mills mission motorway mount mountain
mountains neck orchard oval overpass park parks parkway parkways pass passage path pike pine pines place plain plains
plaza point points port ports prairie radial ramp ranch rapid rapids rd rest ridge ridges river road roads route row
rue run shoal shoals shore shores skyway spring springs spur spurs square squares st station stravenue stream street
streets summit terrace throughway trace track trafficway trail tunnel turnpike underpass union unions valley valleys
via viaduct view views village villages ville vista walk walks wall way ways well wells
""")
# Words that stand in the name of a hospital or a street and identify none.
PLAIN_PLACE = _words("""
acute and apt area at box cancer care center central centre children children's childrens city clinic clinical
community county day department district east eye family floor general health healthcare home hospice hospital
hospitals imaging infirmary inpatient institute local main medical memorial mercy mount national new north nursing of
old other outpatient outside pain po private public radiology referring regional rehabilitation saint sleep south st
stroke suite surgery surgical teaching the this to trauma university urgent va veterans walk-in west women's womens
wound your
""")

# Two letters are read as they stand, names of states in any case.
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ALN]|(?<=, )ID|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|"
    r"V[AT]|W[AIVY]|(?i:Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|"
    r"Hawaii|Idaho|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|"
    r"Mississippi|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|(?:North|"
    r"South) (?:Carolina|Dakota)|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|Tennessee|Texas|Utah|Vermont|"
    r"(?:West )?Virginia|Washington|Wisconsin|Wyoming|Puerto Rico))\b"
)

# Words of a label; "#" at its end asks for a number word or sign after it ("unit no. 12345", not "unit 12345").
LABELS = {
    "ssn": "ssn, ss #, social security, soc sec, last four of ssn",
    "mrn": "mrn, mr #, medical record, medical rec, med rec, med record, patient #, pt #, pat #, unit #, hospital #, "
    "chart #, record #, patient mrn, emr #, patient medical record",
    "accession": "accession, acc, accn, access #, order #, exam #, examination #, requisition, "
    "study accession, procedure #",
    "health_plan": "member #, insurance, insurance policy, medicare, medicaid, policy, subscriber, health plan, "
    "health plan beneficiary, beneficiary, group #, medicare hic, hic, hicn, mbi, payer #, plan #",
    "account": "account, acct, fin, csn, encounter, visit, billing account, billing #, iban, card, credit card, har, "
    "invoice, guarantor #, bank account",
    "license": "npi, dea, license, licence, state license, medical license, driver's license, drivers license, "
    "driver license, certificate #, upin",
    "vehicle": "vin, vehicle, vehicle identification",
    "device": "serial, s/n, sn, device, device serial, udi, lot #, implant #, implant serial, scanner #, scanner s/n, "
    "model #, pacemaker serial, generator serial, catalog #, ref #",
    "biometric": "fingerprint, finger print, iris scan, retinal scan, retina scan, voiceprint, voice print, biometric, "
    "palm print, palmprint, face template, handprint",
    "photo": "photo #, photograph #",
    "zip": "zip, zip code, postal code, home zip, home zip code, patient zip, patient zip code",
    "other_id": "study #, subject, research subject, trial, trial subject, case #, specimen #, employee #, badge, "
    "passport, participant, report #, uuid, guid, research #, enrollment #, sample #, id #, job #, document #, "
    "claim #, pathology #, registry #, donor #, tattoo #, user #, dictation #, confirmation #, ticket #, protocol #",
}
