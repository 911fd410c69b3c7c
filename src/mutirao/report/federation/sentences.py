"""Every text of the evidence sheet, in English and in Portuguese (pt-BR), in one table.

Numbers, names and hashes are put in by name. What other parts of the program say in English
(a fault of the log, a note, what an update holds) is shown as it is; the policy's gaps, which
are few, are translated here and stay English where a new one has no translation yet.
"""

from __future__ import annotations

from typing import Literal, get_args

from mutirao.console import format_bytes

Language = Literal["en", "pt-BR"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

TEXTS: dict[str, tuple[str, str]] = {
    "title": ("Evidence sheet", "Folha de evidências"),
    "for_whom": (
        "for the data-protection officer of site {site}",
        "para a pessoa encarregada de proteção de dados da instituição {site}",
    ),
    # The log.
    "log_whole": ("The log is whole.", "O registro está íntegro."),
    "log_whole_more": (
        "{records} records, each signed and holding the hash of the one before; none was altered, "
        "removed or put elsewhere.",
        "{records} entradas, cada uma assinada e com o hash da anterior; nenhuma foi alterada, "
        "removida ou deslocada.",
    ),
    "log_broken": ("THE LOG IS NOT WHOLE.", "O REGISTRO NÃO ESTÁ ÍNTEGRO."),
    "log_broken_more": (
        "Only the {records} good records before the fault are shown. Do not rely on this sheet.",
        "São mostradas só as {records} entradas boas antes da falha. Não confie nesta folha.",
    ),
    "key_given": (
        "Checked with a public key that was given for it.",
        "Verificado com uma chave pública fornecida para isso.",
    ),
    "key_folder": (
        "Checked with the public key in the site's own folder.",
        "Verificado com a chave pública da pasta da própria instituição.",
    ),
    "key_log": (
        "Checked with the key that the log itself names: this does not tell whose log it is.",
        "Verificado com a chave que o próprio registro indica: isso não diz de quem ele é.",
    ),
    # Who, when, which run.
    "who": ("Who, when, which training", "Quem, quando, qual treinamento"),
    "run": ("training", "treinamento"),
    "recipe": ("recipe (hash of the plan)", "receita (hash do plano)"),
    "recipient": ("sent to", "enviado a"),
    "period": ("{first} to {last} (UTC, site's clock)", "{first} a {last} (UTC, relógio local)"),
    "content": ("in an update", "em uma atualização"),
    "tensors_named": ("its tensors", "seus tensores"),
    "and_more": ("and {number} more", "e mais {number}"),
    # What left.
    "left": ("What left: {size} in all", "O que saiu: {size} no total"),
    "nothing_left": ("Nothing left, says the log.", "Nada saiu, segundo o registro."),
    "round": ("round", "rodada"),
    "time": ("time (UTC)", "hora (UTC)"),
    "kind": ("kind, encoding", "tipo, codificação"),
    "size": ("size", "tamanho"),
    "tensors": ("tensors", "tensores"),
    "payload": ("sha256 of the payload", "sha256 do conteúdo"),
    "added_up": (
        "{number} payloads; their hashes are in records {first} to {last}",
        "{number} conteúdos; seus hashes estão nas entradas {first} a {last}",
    ),
    "sent_again": ("same bytes {number} times", "os mesmos bytes {number} vezes"),
    "kind_adapter update": ("adapter update", "atualização do adaptador"),
    "kind_weights update": ("update of all weights", "atualização de todos os pesos"),
    "kind_losses": ("losses", "perdas (erro do modelo)"),
    "kind_secure aggregation": ("messages of secure aggregation", "mensagens da agregação segura"),
    "kind_error": ("sentences in place of an answer", "frases em lugar de resposta"),
    # Raw text.
    "raw": ("The text itself", "O texto em si"),
    "raw_stayed": (
        "No record is of a kind that holds text of your documents.",
        "Nenhuma entrada é de um tipo que contenha texto dos seus documentos.",
    ),
    "raw_unknown": (
        "Kinds that this version does not know: {kinds}. Ask what they hold.",
        "Tipos que esta versão não conhece: {kinds}. Pergunte o que contêm.",
    ),
    "raw_broken": (
        "What stands here holds only for the records before the fault.",
        "O que consta aqui vale só para as entradas antes da falha.",
    ),
    "raw_how": (
        "The site's own program trains on the text inside the site and has one way out: it "
        "makes no other kinds of message than changes of the model, losses, messages of secure "
        "aggregation and sentences that refuse ({sentences} of these); greetings hold hashes "
        "alone. Nothing that the coordinator sends is executed. Each payload is written into this "
        "log before it may leave. Whether anything left past the program, only your firewall "
        "can tell.",
        "O programa da própria instituição treina com o texto dentro dela e tem uma única saída: "
        "não produz outros tipos de mensagem além de mudanças do modelo, perdas, mensagens da "
        "agregação segura e frases de recusa ({sentences} destas); saudações contêm só hashes. "
        "Nada que a coordenação envia é executado. Cada conteúdo é escrito neste registro antes "
        "de poder sair. Se algo saiu por fora do programa, só o seu firewall pode dizer.",
    ),
    # Secure aggregation.
    "secure": ("Secure aggregation", "Agregação segura"),
    "secure_yes": (
        "{masked} of {updates} updates masked; only sums of at least {least} sites can be read"
        "{most}.",
        "{masked} de {updates} atualizações mascaradas; só somas de ao menos {least} instituições "
        "podem ser lidas{most}.",
    ),
    "secure_most": (" ({most} in some rounds)", " ({most} em algumas rodadas)"),
    "secure_none": (
        "None: all {updates} updates left in clear; the coordinator can read each.",
        "Nenhuma: todas as {updates} atualizações saíram em claro; a coordenação pode ler cada "
        "uma.",
    ),
    # Differential privacy.
    "privacy": ("Differential privacy", "Privacidade diferencial"),
    "privacy_yes": (
        "ε = {epsilon} at δ = {delta}, spent so far; noise {noise} × clip {clip}, for one unit (a "
        "patient); {noisy} of {updates} updates.",
        "ε = {epsilon} com δ = {delta}, gasto até aqui; ruído {noise} × corte {clip}, para uma "
        "unidade (um paciente); {noisy} de {updates} atualizações.",
    ),
    "privacy_none": (
        "None: no noise was added, and no ε holds.",
        "Nenhuma: não houve ruído e nenhum ε vale.",
    ),
    "no_update": ("No update left.", "Nenhuma atualização saiu."),
    # Policy.
    "policy": ("Your policy", "A sua política"),
    "policy_none": (
        "No policy file was given for this sheet.",
        "Nenhum arquivo de política foi dado para esta folha.",
    ),
    "policy_unasked": (
        "{number} updates left without any policy being asked.",
        "{number} atualizações saíram sem que nenhuma política fosse consultada.",
    ),
    "policy_other": (
        "The last update was NOT allowed by this file but by another version, or by none.",
        "A última atualização NÃO foi permitida por este arquivo, mas por outra versão, ou por "
        "nenhuma.",
    ),
    "policy_same": (
        "The last update was allowed by this very file.",
        "A última atualização foi permitida por este mesmo arquivo.",
    ),
    "rule_recipes": ("recipes", "receitas"),
    "rule_coordinators": ("recipients", "destinatários"),
    "rule_app_bundles": ("app bundles", "pacotes de aplicativo"),
    "rule_kinds": ("kinds", "tipos"),
    "rule_codecs": ("encodings", "codificações"),
    "rule_tensors": ("tensors", "tensores"),
    "rule_bytes": ("at most", "no máximo"),
    "rule_bytes_value": ("{day} a day, {run} a training", "{day} por dia, {run} por treinamento"),
    "rule_cohort": ("sums of at least", "somas de ao menos"),
    "rule_cohort_value": ("{number} sites", "{number} instituições"),
    "rule_epsilon": ("ε at most", "ε no máximo"),
    "rule_epsilon_value": (
        "{epsilon}; {rounds} rounds without noise",
        "{epsilon}; {rounds} rodadas sem ruído",
    ),
    "any": ("any", "qualquer"),
    "listed": ("{number} listed", "{number} na lista"),
    "gaps": ("Left open: it", "Em aberto: ela"),
    "no_gaps": (
        "It leaves none of the known gaps open.",
        "Não deixa aberta nenhuma lacuna conhecida.",
    ),
    "gap_trains any recipe": ("trains any recipe", "treina qualquer receita"),
    "gap_runs any app bundle": (
        "runs any app bundle",
        "executa qualquer pacote de aplicativo",
    ),
    "gap_sends to any coordinator": (
        "sends to any coordinator",
        "envia a qualquer coordenação",
    ),
    "gap_lets tensors of any name leave": (
        "lets tensors of any name leave",
        "deixa sair tensores de qualquer nome",
    ),
    "gap_lets updates leave in clear, without secure aggregation": (
        "lets updates leave in clear, without secure aggregation",
        "deixa atualizações saírem em claro, sem agregação segura",
    ),
    "gap_lets updates leave without differential privacy": (
        "lets updates leave without differential privacy",
        "deixa atualizações saírem sem privacidade diferencial",
    ),
    # Attacks.
    "attacks": (
        "What attacks found in a benchmark, not in this training",
        "O que ataques acharam em um teste padrão, não neste treinamento",
    ),
    "attacks_none": (
        "No results of privacy attacks were given for this sheet.",
        "Nenhum resultado de ataques à privacidade foi dado para esta folha.",
    ),
    "attacks_what": (
        "By whoever sees what the coordinator sees. Membership: was a given record learned from? "
        "0.5 is a coin toss. Written down: made-up secrets that the model gives away. Site "
        "named: which site had a rare token (chance in brackets). That an attack fails proves "
        "nothing about the next one; only ε does.",
        "Por quem vê o que a coordenação vê. Participação: certo registro foi usado? 0,5 é cara ou "
        "coroa. Revelados: segredos inventados que o modelo entrega. Origem: de qual instituição "
        "veio um token raro (acaso entre parênteses). Um ataque falhar nada prova sobre o "
        "próximo; só o ε prova.",
    ),
    "defence": ("defence", "defesa"),
    "membership": ("membership, AUC", "participação, AUC"),
    "found_at": ("found at 1 % false", "achados com 1 % falsos"),
    "written_down": ("written down", "revelados"),
    "site_named": ("site named", "origem"),
    "audited": ("ε shown ≥ / claimed", "ε provado ≥ / declarado"),
    # What is not protected.
    "unprotected": ("What is not protected", "O que não está protegido"),
    "open_clear": (
        "Something of your text can be inferred from a change of the model, and the coordinator "
        "sees yours alone.",
        "De uma mudança do modelo se pode inferir algo do seu texto, e a coordenação vê a sua "
        "sozinha.",
    ),
    "open_sum": (
        "Secure aggregation hides single changes, not their sum: the sum still tells something "
        "of the text, and of yours if the other sites collude.",
        "A agregação segura esconde cada mudança, não a soma: a soma ainda diz algo do texto, e do "
        "seu se as outras instituições conspirarem.",
    ),
    "open_formal": (
        "Without differential privacy there is no formal guarantee for any patient.",
        "Sem privacidade diferencial não há garantia formal para nenhum paciente.",
    ),
    "open_epsilon": (
        "ε bounds what can be learned of one patient; it is not zero, adds up over trainings, and "
        "does not cover what many patients have in common.",
        "O ε limita o que se aprende de um paciente; não é zero, soma-se entre treinamentos e não "
        "cobre o que muitos pacientes têm em comum.",
    ),
    "open_names": (
        "Names in the text are not removed, and the model may repeat what it has learned. It goes "
        "to all sites, and cannot be called back.",
        "Nomes no texto não são removidos, e o modelo pode repetir o que aprendeu. Ele vai a todas "
        "as instituições e não pode ser recolhido.",
    ),
    "open_beside": (
        "When and how often you train, sizes and durations are seen by the coordinator; without "
        "noise so are losses and numbers of tokens.",
        "A coordenação vê quando e quanto você treina, tamanhos e durações; sem ruído, também "
        "perdas e números de tokens.",
    ),
    "open_log": (
        "Whoever holds the private key can write the log anew; a head of it kept elsewhere "
        "guards against that.",
        "Quem tem a chave privada pode reescrever o registro; uma cópia do seu fim guardada fora "
        "protege contra isso.",
    ),
    # Keys and hashes.
    "keys": ("Keys and hashes", "Chaves e hashes"),
    "site_key": ("site's public key", "chave pública da instituição"),
    "log_end": ("end of the log, record {records}", "fim do registro, entrada {records}"),
    "policy_file": ("policy file", "arquivo da política"),
    "policies_named": ("policies that records name", "políticas citadas nas entradas"),
    "unknown": ("unknown", "desconhecido"),
    "made_by": (
        "Made by Mutirão {version} from the site's own files; records written by version "
        "{versions}. This page loads nothing and sends nothing. To check again: {command}",
        "Feita pelo Mutirão {version} com os arquivos da própria instituição; entradas escritas "
        "pela versão {versions}. Esta página nada carrega e nada envia. Para verificar de novo: "
        "{command}",
    ),
    "sign": ("Read by, date, signature", "Lido por, data, assinatura"),
}


class Sentences:
    """The table in one language, and numbers as people write them there."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __call__(self, key: str, /, **values: object) -> str:
        """Return a text with its values put in."""
        return TEXTS[key][self._column].format(**values)

    def named(self, group: str, name: str) -> str:
        """Return the word for a name that the program gives, or the name itself."""
        key = f"{group}_{name}"
        return self(key) if key in TEXTS else name

    def count(self, number: int) -> str:
        """Return a whole number with its thousands apart."""
        return self._write(f"{number:,}")

    def number(self, value: float, digits: int = 3) -> str:
        """Return a number with a few significant digits."""
        return self._write(f"{value:.{digits}g}")

    def share(self, value: float | None) -> str:
        """Return a share from 0 to 1 in percent, or a dash."""
        return "–" if value is None else self._write(f"{100 * value:.1f} %")

    def size(self, num_bytes: float) -> str:
        """Return a number of bytes."""
        return self._write(format_bytes(num_bytes))

    def _write(self, text: str) -> str:
        if self.language == "en":
            return text
        return text.translate(str.maketrans(",.", ".,"))
