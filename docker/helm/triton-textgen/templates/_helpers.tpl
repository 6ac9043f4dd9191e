{{- define "textgen.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "textgen.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of these pods, those that take requests. */}}
{{- define "textgen.servers" -}}
{{ include "textgen.selector" . }}
app.kubernetes.io/component: server
{{- end }}

{{/* Ranks of one server, where the chart decides it; else empty. */}}
{{- define "textgen.shards" -}}
{{- $pods := .Values.leaderWorkerSet.enabled | ternary (int .Values.leaderWorkerSet.size) 1 }}
{{- $each := .Values.gpu.enabled | ternary (int .Values.gpu.count) 1 }}
{{- if gt (mul $pods $each) 1 }}{{ mul $pods $each }}{{ end }}
{{- end }}

{{/* What a scaler scales. */}}
{{- define "textgen.target" -}}
{{- if .Values.leaderWorkerSet.enabled -}}
{apiVersion: leaderworkerset.x-k8s.io/v1, kind: LeaderWorkerSet, name: {{ include "textgen.name" . }}}
{{- else -}}
{apiVersion: apps/v1, kind: Deployment, name: {{ include "textgen.name" . }}}
{{- end }}
{{- end }}

{{- define "textgen.labels" -}}
{{ include "textgen.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "textgen.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The process that asks needs a few seconds beside the answer, so Kubernetes waits longer than the command. While the
metrics show that the server generates for others, nothing is asked of it. */}}
{{- define "textgen.probe" -}}
exec:
  command: [textgen, health, --url, "localhost:8001", --metrics-url, "http://localhost:8002/metrics", --timeout, {{ .timeoutSeconds | quote }}]
periodSeconds: {{ .periodSeconds }}
timeoutSeconds: {{ add .timeoutSeconds 10 }}
failureThreshold: {{ .failureThreshold }}
{{- end }}

{{/* Helm reads numbers as floats: 1000000 must not become 1e+06. */}}
{{- define "textgen.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{- define "textgen.check" -}}
{{- $own := list "MODEL_ID" "GRACEFUL_TERMINATION_TIMEOUT" "RESTRICTED_API_KEY" "HOST" "HTTP_PORT" "GRPC_PORT" "METRICS_PORT" "GATEWAY_PORT" }}
{{- $unsupported := list "ROPE_SCALING" }}
{{- range $name := keys .Values.options | sortAlpha }}
{{- if has $name $own }}{{ fail (printf "options.%s: the chart sets it; see values.yaml" $name) }}{{ end }}
{{- if has $name $unsupported }}{{ fail (printf "options.%s is not supported by this version of the server" $name) }}{{ end }}
{{- end }}
{{- $claim := not (empty .Values.model.pvc.claimName) }}{{ $init := not (empty .Values.model.init.image) }}
{{- if eq $claim $init }}{{ fail "set exactly one of model.pvc.claimName and model.init.image" }}{{ end }}
{{- if not (has .Values.autoscaling.kind (list "" "hpa" "keda")) }}{{ fail "autoscaling.kind must be hpa, keda or empty" }}{{ end }}
{{- if and (include "textgen.shards" .) (hasKey .Values.options "NUM_SHARD") }}{{ fail "options.NUM_SHARD: the chart sets it, from gpu.count and leaderWorkerSet.size" }}{{ end }}
{{- if and .Values.leaderWorkerSet.enabled (not .Values.leaderWorkerSet.secret.existingSecret) }}{{ fail "leaderWorkerSet.secret.existingSecret is needed: the ranks of a group know each other by it" }}{{ end }}
{{- end }}
