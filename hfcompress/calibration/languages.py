# Copyright 2026 The hfcompress authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ruff: noqa: RUF001 (letters of other scripts are meant)
"""Short texts in several languages, written for this package: what calibration on English may have cost."""


def texts() -> dict[str, str]:
    """One text per language, about 1,000 characters each, by the language's English name; line breaks are blanks."""
    return {language: " ".join(text.split()) for language, text in _TEXTS.items()}


_TEXTS = {
    "German": """
        Hinter dem Haus liegt ein Garten, der größer ist, als man von der Straße aus vermutet. Im März, wenn der
        Boden noch kalt und schwer an den Stiefeln klebt, werden die Beete umgegraben und die Wege mit frischem Kies
        bestreut. Kurz darauf kommen die Zwiebeln in die Erde, dann Erbsen, Möhren und zuletzt die Bohnen, die
        keinen Frost vertragen. An der Südwand wachsen zwei alte Birnbäume, deren Äste so flach an Drähten gezogen
        sind, dass sie wie ein Leuchter aussehen. Im Sommer reicht der Regen selten aus, und abends trägt jemand
        zwanzig Kannen Wasser vom Brunnen zu den Gurken und Tomaten. Wer genau hinsieht, entdeckt unter den großen
        Blättern des Kürbisses eine Kröte, die dort tagsüber schläft und nachts die Schnecken frisst. Im September
        duftet es nach Äpfeln und nach dem Rauch der ersten Feuer. Dann werden Gläser gefüllt, Kräuter getrocknet
        und Samen in kleine Tüten geschrieben, auf denen Sorte und Jahr stehen. Wenn schließlich der erste Schnee
        fällt, ist von all der Arbeit nichts mehr zu sehen; nur die Stangen der Bohnen ragen noch aus dem Weiß und
        zeigen, wo im nächsten Jahr wieder etwas wachsen soll.
    """,
    "French": """
        Le boulanger se lève à deux heures, quand la rue est encore vide et que seules quelques fenêtres brillent
        au-dessus de la place. Il commence par peser la farine, l'eau et le sel, puis il ajoute le levain qu'il
        nourrit chaque jour depuis des années. La pâte tourne lentement dans le pétrin ; elle est d'abord collante
        et grise, ensuite elle devient lisse et se détache du bord. Pendant qu'elle repose sous un linge, le four
        chauffe, et l'on entend craquer les briques. Vers quatre heures, les pains sont façonnés à la main : des
        boules, des couronnes, de longues baguettes que l'on pose dans des plis de toile. Un coup de lame sur
        chacune, un peu de vapeur, et la porte se referme. Bientôt l'odeur traverse la cour et réveille les voisins
        avant leur réveil. À six heures et demie, la boutique ouvre ; les premiers clients sont l'infirmière qui
        rentre de sa nuit et le facteur qui part pour sa tournée. Ils parlent du temps, du prix du beurre, d'un
        chien perdu. À midi il ne reste presque rien sur les étagères, et le boulanger, fatigué mais content, balaie
        la farine tombée sur le carrelage avant d'aller dormir.
    """,
    "Spanish": """
        La estación del pueblo tiene un solo andén y un reloj que siempre va tres minutos adelantado. Por la mañana
        llega un tren corto, de dos vagones, que baja desde la montaña con estudiantes, quesos y cartas. El jefe de
        estación conoce a casi todos los viajeros por su nombre, y cuando alguien se retrasa le pide al maquinista
        que espere un poco más. Las vías cruzan primero los campos de trigo, luego un puente de hierro sobre el río
        y por fin un túnel tan largo que los niños cuentan en voz alta hasta que vuelve la luz. Al otro lado empieza
        la llanura: olivos plantados en filas, casas blancas, algún molino sin aspas. En verano el calor dobla el
        aire sobre los raíles, y los pasajeros bajan las cortinas y comparten melón y agua fría. En invierno, en
        cambio, la niebla es tan espesa que el tren avanza despacio, haciendo sonar su bocina en cada camino. Dicen
        que dentro de pocos años habrá una línea nueva, más recta y más rápida, que no pasará por aquí. Entonces la
        sala de espera será quizá una biblioteca, y el viejo reloj seguirá señalando una hora que nadie necesita.
    """,
    "Italian": """
        Il fiume nasce tra i sassi, sotto un ghiacciaio che ogni estate si ritira di qualche passo. All'inizio è
        soltanto un filo d'acqua, così fredda che non si può tenervi la mano per più di un minuto. Scendendo
        raccoglie altri torrenti, attraversa un bosco di larici e forma una cascata che si sente da lontano,
        soprattutto in maggio, quando la neve si scioglie. Nella valle diventa più largo e più lento; le rive sono
        coperte di salici, e i bambini costruiscono dighe con rami e pietre. Un tempo qui lavoravano sei mulini,
        oggi ne rimane uno, la cui ruota gira ancora per i visitatori della domenica. Più a valle ci sono i campi di
        mais, le cascine con i tetti rossi e i canali scavati secoli fa per portare l'acqua alle risaie. Quando
        piove per molti giorni il fiume sale, prende il colore del fango e trascina tronchi interi; allora gli
        abitanti controllano gli argini di notte, con le lampade. Poi torna calmo, lascia sulla ghiaia un po' di
        sabbia nuova e continua verso la città, dove passa sotto undici ponti prima di perdersi, quasi senza rumore,
        nel mare.
    """,
    "Polish": """
        Jesienią całe rodziny wyjeżdżają do lasu na grzyby. Wstaje się przed świtem, pakuje do koszyka nóż, kanapki
        i termos z gorącą herbatą, a potem idzie się w milczeniu, bo każdy chce pierwszy coś znaleźć. Najlepsze
        miejsca są tajemnicą: dziadek pokazuje je wnukom dopiero wtedy, gdy nauczą się odróżniać maślaki od gąsek i
        nie depczą wrzosów. Po deszczu mech jest miękki jak poduszka, pachnie żywicą i mokrą korą, a między sosnami
        wiszą pajęczyny pełne kropel. Czasem trzeba długo szukać, lecz kiedy pojawi się jeden borowik, zwykle obok
        rosną następne, ukryte pod liśćmi. W południe wszyscy siadają na zwalonym pniu, porównują zbiory i
        opowiadają o dzikach, które słyszeli w zaroślach. W domu zaczyna się prawdziwa praca: grzyby się czyści,
        kroi, suszy nad piecem albo zalewa octem z cebulą i zielem angielskim. Słoiki stoją później w spiżarni aż do
        świąt, kiedy to trafiają na stół razem z barszczem i pierogami. Ktoś zawsze pyta wtedy, skąd są takie dobre,
        a dziadek tylko się uśmiecha i mówi, że z daleka.
    """,
    "Turkish": """
        Sabahın erken saatlerinde çarşı henüz sessizdir; yalnızca kepenklerin açılma sesi ve süpürgelerin taş
        zeminde çıkardığı hışırtı duyulur. Çaycı, büyük semaverin altını yakar, bardakları sıcak suyla çalkalar ve
        ilk demi hazırlar. Biraz sonra çırağı elinde sallanan tepsiyle dükkândan dükkâna koşmaya başlar. Bakırcı,
        tezgâhın önüne oturup ince çekiciyle bir tencerenin kenarını düzeltir; karşısındaki kumaşçı ise toplarını
        renklerine göre dizer. Öğleye doğru kalabalık artar: köyden gelenler peynir ve bal satar, öğrenciler defter
        seçer, yaşlılar gölgede oturup gelip geçeni seyreder. Pazarlık aceleye gelmez, çünkü fiyat kadar sohbet de
        önemlidir. Müşteri bir halıyı beğenirse hemen söylemez, önce havadan, yağmurdan, çocukların okulundan
        konuşulur. Akşamüstü güneş kubbenin küçük pencerelerinden eğik girer ve havadaki tozu altın gibi parlatır.
        Dükkânlar birer birer kapanır, kediler balıkçının önünde toplanır, çaycı son bardakları yıkar. Gece bekçisi
        ağır kapıyı kilitlediğinde içeride yalnızca baharat kokusu kalır ve ertesi güne kadar kimse o kokuyu bozmaz.
    """,
    "Russian": """
        Поезд отходит поздно вечером, когда на перроне уже горят фонари и снег под ногами скрипит от мороза.
        Проводница проверяет билеты, желает спокойной ночи и приносит чай в стаканах с тяжёлыми подстаканниками.
        Пассажиры быстро знакомятся: один едет к дочери, другой возвращается из командировки, третий просто любит
        дорогу. На столике появляются варёные яйца, огурцы и домашний пирог, и каждый считает своим долгом угостить
        соседа. За окном проплывают тёмные деревни, редкие огни, длинные ряды берёз вдоль насыпи. На больших
        станциях стоят минут двадцать; можно выйти, вдохнуть холодный воздух и купить у бабушки горячую картошку с
        укропом. Ночью колёса стучат ровно, и под этот звук хорошо думается или спится. Утром вагон просыпается не
        сразу: кто-то умывается, кто-то ищет очки, дети рисуют пальцем на замёрзшем стекле. За сутки равнина почти
        не меняется, но ближе к горам воздух становится прозрачнее, а реки быстрее. Когда наконец объявляют конечную
        станцию, все торопливо собирают вещи, обещают писать друг другу и, конечно, никогда не пишут.
    """,
    "Greek": """
        Το λιμάνι του νησιού ξυπνά πριν από τον ήλιο. Οι ψαράδες λύνουν τα σχοινιά, ανάβουν τις μηχανές και βγαίνουν
        αργά από τον κόλπο, ενώ οι γλάροι τους ακολουθούν φωνάζοντας. Στην προκυμαία ο καφετζής βάζει τις καρέκλες
        στη σειρά και σκουπίζει την αρμύρα από τα τραπέζια. Όταν οι βάρκες γυρίζουν, κατά τις εννέα, μαζεύεται
        κόσμος για να δει τι έπιασαν: σαρδέλες, μπαρμπούνια, καμιά φορά ένα μεγάλο χταπόδι. Οι γυναίκες διαλέγουν,
        παζαρεύουν, γελούν, και σε λίγη ώρα τα καφάσια είναι άδεια. Το μεσημέρι η ζέστη κλείνει τα παράθυρα και οι
        δρόμοι μένουν έρημοι, μόνο τα τζιτζίκια ακούγονται στα πεύκα. Το απόγευμα έρχεται το πλοίο από την
        πρωτεύουσα με εφημερίδες, λαχανικά και επισκέπτες που ψάχνουν δωμάτιο με θέα. Τα παιδιά βουτούν από τον μόλο
        και μετρούν ποιος θα μείνει περισσότερο κάτω από το νερό. Ύστερα ο άνεμος πέφτει, η θάλασσα γίνεται λεία σαν
        λάδι και οι παλιοί επισκευάζουν τα δίχτυα τους, λέγοντας ιστορίες για φουρτούνες που ίσως δεν έγιναν ποτέ
        ακριβώς έτσι.
    """,
}
