{{/* A pod's metadata and spec. root: the chart's context. role: "server", or "worker": the ranks of one host beside a
server's, which speak to nobody but their group. */}}
{{- define "textgen.pod" -}}
{{- $root := .root }}{{ $v := $root.Values }}{{ $worker := eq .role "worker" }}{{ $group := $v.leaderWorkerSet.enabled -}}
metadata:
  labels:
    {{- include "textgen.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $worker | ternary "worker" "server" }}
    {{- with $v.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $v.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  # Kubernetes would set TEXTGEN_SERVICE_HOST for a Service named textgen, and the engine refuses unknown TEXTGEN_*.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $v.termination.preStopSeconds $v.termination.drainSeconds $v.termination.marginSeconds }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- if and $v.gpu.enabled $v.gpu.runtimeClassName }}
  runtimeClassName: {{ $v.gpu.runtimeClassName }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- range $key := list "imagePullSecrets" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $v $key }}
  {{ $key }}: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if $v.model.init.image }}
  initContainers:
    - name: model
      image: {{ $v.model.init.image | quote }}
      imagePullPolicy: {{ $v.model.init.pullPolicy }}
      {{- range $key := list "command" "env" "resources" }}
      {{- with index $v.model.init $key }}
      {{ $key }}: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      securityContext: {{- include "textgen.security" $root | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: {{ $worker | ternary "worker" "server" }}
      {{- if $worker }}
      # Kubernetes fills in the address, which LeaderWorkerSet sets.
      command: [python3, scripts/worker.py, "--master-addr=$(LWS_LEADER_ADDRESS)"]
      {{- else if $group }}
      args: ["--master-addr=$(LWS_LEADER_ADDRESS)"]
      {{- end }}
      image: "{{ $v.image.repository }}:{{ $v.image.tag | default $root.Chart.AppVersion }}"
      imagePullPolicy: {{ $v.image.pullPolicy }}
      env:
        - {name: HOME, value: /cache}
        - {name: MODEL_ID, value: {{ $v.model.path | quote }}}
        - {name: GRACEFUL_TERMINATION_TIMEOUT, value: {{ include "textgen.text" $v.termination.drainSeconds | quote }}}
        {{- with include "textgen.shards" $root }}
        - {name: NUM_SHARD, value: {{ . | quote }}}
        {{- end }}
        {{- if $group }}
        - {name: TEXTGEN_NUM_NODES, value: {{ include "textgen.text" $v.leaderWorkerSet.size | quote }}}
        - {name: MASTER_PORT, value: {{ include "textgen.text" $v.leaderWorkerSet.masterPort | quote }}}
        - name: TEXTGEN_GROUP_SECRET
          valueFrom:
            secretKeyRef: {name: {{ $v.leaderWorkerSet.secret.existingSecret }}, key: {{ $v.leaderWorkerSet.secret.key }}}
        {{- end }}
        {{- if $worker }}
        - name: NODE_RANK
          valueFrom:
            fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}
        {{- end }}
        {{- range $name, $value := $v.options }}
        - {name: {{ $name }}, value: {{ include "textgen.text" $value | quote }}}
        {{- end }}
        {{- if and $v.adminKey.existingSecret (not $worker) }}
        - name: RESTRICTED_API_KEY
          valueFrom:
            secretKeyRef: {name: {{ $v.adminKey.existingSecret }}, key: {{ $v.adminKey.key }}}
        {{- end }}
        {{- with $v.extraEnv }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- if not $worker }}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 8001}
        - {name: metrics, containerPort: 8002}
        - {name: gateway, containerPort: 8080}
      startupProbe: {{- include "textgen.probe" $v.probes.startup | nindent 8 }}
      readinessProbe: {{- include "textgen.probe" $v.probes.readiness | nindent 8 }}
      livenessProbe: {{- include "textgen.probe" $v.probes.liveness | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ include "textgen.text" $v.termination.preStopSeconds | quote }}]
      {{- end }}
      {{- $resources := deepCopy $v.resources }}
      {{- if $v.gpu.enabled }}
      {{- $_ := set $resources "limits" (merge (dict $v.gpu.resourceName (int $v.gpu.count)) ($resources.limits | default dict)) }}
      {{- end }}
      resources: {{- toYaml $resources | nindent 8 }}
      securityContext: {{- include "textgen.security" $root | nindent 8 }}
      volumeMounts:
        - name: models
          mountPath: /models
          readOnly: true
          {{- if and $v.model.pvc.claimName $v.model.pvc.subPath }}
          subPath: {{ $v.model.pvc.subPath }}
          {{- end }}
        - {name: shm, mountPath: /dev/shm}
        - {name: cache, mountPath: /cache}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: models
      {{- if $v.model.pvc.claimName }}
      persistentVolumeClaim: {claimName: {{ $v.model.pvc.claimName }}, readOnly: true}
      {{- else }}
      emptyDir: {sizeLimit: {{ $v.model.init.sizeLimit }}}
      {{- end }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $v.sharedMemory }}}
    - name: cache
      emptyDir: {sizeLimit: {{ $v.cacheSize }}}
    - name: tmp
      emptyDir: {sizeLimit: {{ $v.tmpSize }}}
{{- end }}
