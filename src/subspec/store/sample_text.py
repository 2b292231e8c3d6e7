"""A short text of many kinds: what ``activations`` sends through a model while its store is prepared."""

SAMPLE_TEXT = """\
The harbour was quiet when the last ferry came in. A woman in a grey coat waited by the lamp, \
holding a letter that she had read so often that its folds were torn. "You are late," she said, \
and the captain, who had heard worse from better people, only shrugged and handed her the key. It \
would rain before morning; the gulls knew it, and so did the old men on the bench, who had stopped\
 arguing about the price of herring.

Question: Why do metals feel colder than wood at the same temperature?
Answer: Because they carry heat away from the hand faster. Heat flows from the skin into the \
material until both are equally warm. In copper it spreads about 2,000 times as fast as in oak, so\
 the surface stays cool, and the skin goes on losing energy. Three things decide how strong the \
effect is:
1. thermal conductivity,
2. heat capacity per volume,
3. how well the two surfaces touch.

def merge(left: list[int], right: list[int]) -> list[int]:
    \"\"\"Merge two sorted lists.\"\"\"
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]

Dear Mr. Okafor, thank you for your message of 12 March. We are sorry that the second parcel \
(order no. 48-1177) arrived damaged. A replacement left our warehouse today, and you do not need \
to send anything back. If it has not reached you by Friday, please write to us again, or call \
between 9:00 and 17:30.

If a train travels 180 km in 2 hours and 15 minutes, its average speed is 180 / 2.25 = 80 km/h. At\
 that speed, 300 km take 300 / 80 = 3.75 hours, that is 3 hours and 45 minutes. Let x be the \
number of adults: x + (x - 4) = 26, so 2x = 30 and x = 15.

{"name": "sensor-7", "active": true, "readings": [21.5, 21.7, 22.0], "unit": "C", "place": \
{"floor": 3, "room": "B"}}

SELECT city, COUNT(*) AS visits FROM trips WHERE year >= 2015 GROUP BY city ORDER BY visits DESC \
LIMIT 10;

Im Winter frieren die Seen zu, und die Kinder laufen nach der Schule Schlittschuh. \
La biblioteca cierra a las ocho, pero los domingos abre solo por la manana. \
Le pain sortait du four quand nous sommes arrives au village. \
\u6625\u5929\u6765\u4e86\uff0c\u8def\u8fb9\u7684\u6811\u90fd\u53d1\u82bd\u4e86\uff0c\u5b69\
\u5b50\u4eec\u5728\u516c\u56ed\u91cc\u653e\u98ce\u7b5d\u3002

In summary, the treaty of that year ended a long quarrel over the river, but not over its fish. \
The northern towns kept their mills; the southern ones were promised a road, which was never \
built. Historians disagree about who gained more. What is certain is that trade doubled within a \
generation, and that the word for "bridge" in the local dialect still means "agreement".
"""
